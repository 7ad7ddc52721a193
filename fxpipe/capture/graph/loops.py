"""The proof of a loss that takes the samples one after the other: three recordings, not paired call by call.

A loop over the samples makes other calls for other numbers of them. What stands before and after it is the same in
all recordings; from there on each of them is run as it is: a batch in the one of three times the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe._torch import FakeTensor
from fxpipe.batch.inputs import Inputs
from fxpipe.capture.calls.reads import answer_of
from fxpipe.capture.graph.driven import DRIVEN
from fxpipe.capture.graph.given import PARTS, Kind, Values
from fxpipe.capture.graph.proof import MOST_ELEMENTS, Proof, Run, Verdict
from fxpipe.capture.graph.sizes import Sizes, Unsuited
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.graph.tail import (
    Summand,
    Tail,
    TailProgram,
    inputs_of,
    is_handed_out,
    is_of_model,
    is_past_blocks,
    tried_quietly,
)
from fxpipe.capture.graph.twins import Twins, spelled
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import info, is_constant, reached, sources
from fxpipe.capture.record.observe import Observation


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """One forward, recorded and understood."""

    observation: Observation
    structure: Structure

    @property
    def result(self) -> fx.Node:
        """The loss."""
        return self.structure.results[0]


def prove_loops(
    skeleton: Skeleton, one: Recording, two: Recording, three: Recording, inputs: Inputs, reason: str
) -> Verdict:
    """Find the weights under which a loss's microbatches give the batch's value and gradients.

    Args:
        skeleton: The copy of the model.
        one: A recording.
        two: Of twice the samples.
        three: Of three times as many.
        inputs: What the first was recorded with.
        reason: Why the first two are not paired call by call.
    """
    try:
        with tried_quietly():
            return _Loops(skeleton, one, two, three, inputs).verdict()
    except Unsuited as unsuited:
        return Verdict(reason=f"{reason}; {unsuited}")


def _paired(one: Recording, other: Recording) -> dict[fx.Node, fx.Node]:
    """Pair what comes before the first call that differs, and what comes after the last."""
    mine, theirs = one.structure.nodes, other.structure.nodes
    shorter = min(len(mine), len(theirs))

    def same(left: fx.Node, right: fx.Node) -> bool:
        return left.op == right.op and spelled(left) == spelled(right)

    first = next((at for at in range(shorter) if not same(mine[at], theirs[at])), shorter)
    last = next((at for at in range(shorter - first) if not same(mine[-1 - at], theirs[-1 - at])), shorter - first)
    pairs = dict(zip(mine[:first], theirs[:first], strict=True))
    return pairs | dict(zip(mine[len(mine) - last :], theirs[len(theirs) - last :], strict=True))


class _Loops(Proof):
    """A loss whose recordings differ by more than numbers."""

    def __init__(self, skeleton: Skeleton, one: Recording, two: Recording, three: Recording, inputs: Inputs) -> None:
        self._twice, self._thrice = _paired(one, two), _paired(one, three)
        unclear = frozenset(inputs.unclear)
        observation, samples = one.observation, inputs.samples
        constants = two.observation.recorder.constants
        twins = Twins(skeleton, observation, one.structure, self._twice, constants, samples, (), unclear)
        given = self._handed_out(twins, one.result)
        self._parts = _Alone(skeleton, one, given, samples)
        self._whole = _Alone(skeleton, three, {self._thrice[node] for node in given}, PARTS * samples)
        common = [node for node in self._parts.tail.sources if node in self._twice and not _is_fixed(node)]
        tail = Tail(twins, one.result, self._parts.tail.nodes, tuple(common), (), ())
        super().__init__(tail, Summand(one.result), Sizes(samples), samples, inputs.tensors, self._parts.program)

    def _handed_out(self, twins: Twins, result: fx.Node) -> set[fx.Node]:
        """Give the values nearest to the loss that come out of the model's layers in all recordings alike."""
        found: set[fx.Node] = set()

        def follow(node: fx.Node) -> Sequence[fx.Node]:
            known = node in self._twice and node in self._thrice and node is not result
            if (
                known
                and not twins.is_selected(node)
                and twins.sample_dim(node) is not None
                and is_handed_out(twins, node)
            ):
                found.add(node)
                return ()
            return sources(node)

        reached([result], follow)
        return found

    def runs(self, kind: Kind) -> Iterator[Run]:
        """Run several batches, each whole as it was recorded, and split."""
        self._parts.program.floats = self._whole.program.floats = kind.floats
        for trial in range(self.given.trials + DRIVEN):
            try:
                whole, parts = self._values(kind, trial)
                envs = [self._parts.run(part) for part in parts]
                found = self._whole.run({self._thrice[node]: value for node, value in whole.items()})
            except Unsuited:
                raise
            except Exception:  # whatever the user's code raises for values that are not its own
                if trial == 0:
                    raise
                continue
            done = self._as_mine(found)
            same = self._whole.takes_path(found) and all(map(self._parts.takes_path, envs))
            if same and math.isfinite(float(done[self.summand.node].detach())):
                yield Run((whole, parts), done, envs, trial >= self.given.trials)

    def _as_mine(self, found: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        done = {mine: found[theirs] for mine, theirs in self._thrice.items() if theirs in found}
        return {**done, self.summand.node: found[self._whole.tail.result]}

    def _run_whole(self, whole: Values) -> dict[fx.Node, Any]:
        return self._as_mine(self._whole.run({self._thrice[node]: value for node, value in whole.items()}))

    def coupling(self, runs: Sequence[Run]) -> fx.Node | None:
        """Give the loss: which call couples samples is not told."""
        return self.summand.node


class _Alone:
    """What one recording computes from where all are alike to the loss, run as it was recorded.

    Args:
        skeleton: The copy of the model.
        recording: The recording.
        given: What comes out of the model's layers.
        samples: How many it has.
    """

    def __init__(self, skeleton: Skeleton, recording: Recording, given: set[fx.Node], samples: int) -> None:
        observation, structure = recording.observation, recording.structure

        def follow(node: fx.Node) -> Sequence[fx.Node]:
            return () if node in given or node.op in ("placeholder", "get_attr") else sources(node)

        needed = set(reached([recording.result], follow))
        graph = observation.recorder.graph
        related = [
            guard
            for guard in observation.guards
            if inputs_of(guard.node) & needed or (not guard.is_choice and is_past_blocks(graph, skeleton, guard.node))
        ]
        if any(not isinstance(guard.answer, bool) and guard.node.target is not getattr for guard in related):
            raise Unsuited("Python reads a number from an input, and takes each sample by itself")
        self._choices = [(guard.node, guard.answer) for guard in related if isinstance(guard.answer, bool)]
        for node, _ in self._choices:
            needed.update(reached([node]))
        ordered = [node for node in observation.recorder.graph.nodes if node in needed]
        starts = tuple(node for node in ordered if node in given or node.op in ("placeholder", "get_attr"))
        calls = tuple(node for node in ordered if node not in starts)
        same = {node: node for node in ordered}
        twins = Twins(skeleton, observation, structure, same, observation.recorder.constants, samples, ())
        self.tail = Tail(twins, recording.result, calls, starts, (), ())
        self._check_layers(twins)
        self.program = TailProgram(self.tail, Sizes(samples))
        self._samples = samples

    def _check_layers(self, twins: Twins) -> None:
        """Refuse layers that cannot be called with made-up weights for each sample."""
        called = [node for node in self.tail.nodes if is_of_model(twins, node) and not self.tail.is_by_rows(node)]
        total = 0
        for node in called:
            frame = info(node).frame
            if info(node).position is not None or (frame is not None and (frame.drew or frame.inside)):
                raise Unsuited(f"{info(node).layer} draws random numbers for each sample")
            total += sum(each.numel() for each in twins.skeleton.module.get_submodule(str(node.target)).parameters())
        own = (info(node).tensor for node in self.tail.sources if node.op == "get_attr")
        if total + sum(tensor.numel for tensor in own if tensor is not None) > MOST_ELEMENTS:
            raise Unsuited("what it calls for each sample is too large to be tried on values")

    def run(self, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Run it on values of what comes out of the layers and of inputs."""
        given: Values = dict(values)
        for node in self.tail.sources:
            if node not in given and _is_fixed(node):
                given[node] = _fixed(self.tail.twins.one.recorder.constants[str(node.target)])
            elif node not in given:
                raise Unsuited(f"{node.target} is read for other samples only")
        return self.program.run(given, self._samples)

    def takes_path(self, env: Mapping[fx.Node, Any]) -> bool:
        """Whether Python reads the truth values that it read in the forward."""
        return all(answer_of(env[node]) == answer for node, answer in self._choices)


def _is_fixed(node: fx.Node) -> bool:
    return node.op == "get_attr" and is_constant(node)


def _fixed(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor):
        raise Unsuited("it reads a constant without values")
    found = value.detach().cpu()
    return found.double() if found.is_floating_point() else found.clone()

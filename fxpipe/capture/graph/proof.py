"""How the microbatches' values of a number add up to the batch's: tried for real on small values, whole and split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxpipe.capture.calls.reads import answer_of
from fxpipe.capture.graph.counts import Candidate, candidates
from fxpipe.capture.graph.driven import DRIVEN, driven
from fxpipe.capture.graph.given import PARTS, Given, Kind, Values, has_turns, kinds_of
from fxpipe.capture.graph.sizes import Sizes, Unsuited, settings
from fxpipe.capture.graph.tail import Summand, Tail, TailProgram, find_tail, tried_quietly
from fxpipe.capture.graph.twins import Twins, spoken, tensor_of
from fxpipe.capture.record.node import info, is_setting
from fxpipe.capture.record.recorder import find_storage

MOST_ELEMENTS = 1 << 21
"""Elements of all values of one run: with their gradients and three microbatches, 64 MB in float64."""
_ROWS = (
    "rows of which it cannot be told whose they are (those that a mask selects?); with loss_weight=lambda ids, labels: "
    "float((labels != -100).sum()), or the like, each microbatch weighs as many as it has"
)
EXACT = 1e-9
"""Largest difference, relative to the largest summand, that rounding explains in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What was found of one summand.

    Attributes:
        candidate: What weighs its microbatches; None where nothing that was tried does.
        coupling: The call that couples samples, where one was found.
        reason: Why nothing could be tried.
        from_model: Whether it comes out of the model as a number whose making was not seen.
        nothing: Whether it is 0 for all values that were tried.
    """

    candidate: Candidate | None = None
    coupling: fx.Node | None = None
    reason: str = ""
    from_model: bool = False
    nothing: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A batch run whole and in microbatches; ``is_driven`` where its values are those of another, moved."""

    given: tuple[Values, list[Values]]
    whole: dict[fx.Node, Any]
    parts: list[dict[fx.Node, Any]]
    is_driven: bool = False


def prove(twins: Twins, summand: Summand, inputs: Mapping[str, torch.Tensor]) -> Verdict:
    """Find the weights under which a summand's microbatches give the batch's value and gradients.

    Args:
        twins: The recordings.
        summand: A scalar of theirs.
        inputs: The example, by name: what kinds of values there are.
    """
    try:
        factors = [each for scaling in summand.outer for each in scaling.factors]
        tail = find_tail(twins, summand.node, factors)
    except Unsuited as unsuited:
        return Verdict(reason=str(unsuited))
    if tail.opaque:
        made = tail.opaque[0]
        is_number = tensor_of(made).numel == 1
        reason = f"{info(made).layer or made.name} gives {'it as a number of its own' if is_number else _ROWS}"
        return Verdict(reason=reason, from_model=is_number)
    reason = ""
    best = Verdict()
    for sizes, rows in settings(tail.twins.samples, tail.sizes()):
        try:
            with tried_quietly():
                best = Proof(tail, summand, sizes, rows, inputs).verdict()
        except Unsuited as unsuited:
            reason = reason or str(unsuited)
            continue
        if best.candidate is not None or best.coupling is not None:
            return best
        reason = best.reason or reason
    return replace(best, reason=reason)


def is_linear(
    tail: Tail, numbers: Sequence[fx.Node], calls: Sequence[fx.Node], inputs: Mapping[str, torch.Tensor]
) -> bool:
    """Whether a loss is linear in some numbers, whatever else it is computed of.

    Args:
        tail: Of the loss.
        numbers: They.
        calls: What makes the loss of them, in order.
        inputs: The example, by name.

    Raises:
        Unsuited: It cannot be run on small values.
    """
    sizes, rows = next(settings(tail.twins.samples, tail.sizes()))
    with tried_quietly():
        proof = Proof(tail, Summand(tail.result), sizes, rows, inputs)
        for kind in kinds_of(tail, proof.given.asked):
            try:
                run = next(proof.runs(kind), None)
            except Unsuited:
                raise
            except Exception:  # whatever the user's code raises for values that are not its own
                continue
            if run is None:
                continue
            return _is_linear_in(proof.program, run.whole, numbers, calls, rows)
    return False


def _is_linear_in(
    program: TailProgram, env: Mapping[fx.Node, Any], numbers: Sequence[fx.Node], calls: Sequence[fx.Node], rows: int
) -> bool:
    def made(values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        return program.again(env, values, calls, rows)

    zeros = dict.fromkeys(numbers, torch.zeros(()))
    zero = made(zeros)
    drawn = torch.Generator().manual_seed(1)
    for scale in (-100.0, -3.0, -0.3, 0.01, 0.3, 3.0, 100.0, 1.0, 10.0):  # of one sign, and in the last of either
        found = scale * (torch.rand(len(numbers), generator=drawn) + 0.5)
        if scale in (1, 10):
            found *= torch.randint(2, (len(numbers),), generator=drawn) * 2 - 1
        values = dict(zip(numbers, found, strict=True))
        wanted = made(values) - zero
        parts = [made({**zeros, each: values[each]}) - zero for each in numbers]
        twice = made({each: 2 * value for each, value in values.items()}) - zero
        among = [*parts, zero]
        if not (_close(torch.stack(parts).sum(0), wanted, among) and _close(twice, 2 * wanted, among)):
            return False
    return True


class Proof:
    """One summand at one size."""

    def __init__(
        self,
        tail: Tail,
        summand: Summand,
        sizes: Sizes,
        rows: int,
        inputs: Mapping[str, torch.Tensor],
        program: TailProgram | None = None,
    ) -> None:
        self.tail = tail
        self.summand = summand
        self.rows = rows
        self.program = program or TailProgram(tail, sizes)
        self.given = Given(tail, sizes, rows, inputs)
        self._check_cost(sizes)

    def _check_cost(self, sizes: Sizes) -> None:
        total = 0
        for node in (*self.tail.sources, *self.tail.nodes):
            shapes = self.tail.twins.growing(node)
            total += math.prod(sizes.shape(*shapes, PARTS * self.rows)) if shapes is not None else 0
        if total > MOST_ELEMENTS:
            raise Unsuited("it is too large to be tried on values")

    def verdict(self) -> Verdict:
        """Try what may weigh the microbatches on several batches."""
        failed = "it could not be run on small values"
        runs: list[Run] = []
        nothing = any(isinstance(answer, bool) for _, answer in self.tail.reads)
        kinds = list(kinds_of(self.tail, self.given.asked))
        while kinds:
            kind = kinds.pop(0)
            try:
                runs = list(self.runs(kind))
            except Unsuited:
                raise
            except Exception as error:  # whatever the user's code raises for values that are not its own
                failed = f"it could not be run on small values: {type(error).__name__}: {error}".split("\n")[0]
                if self.given.same and not kind.alike:  # it may need them equal: as many rows, say
                    kinds.insert(0, replace(kind, alike=True))
                continue
            if len(runs) < 2:
                continue
            telling = [run for run in runs if not self._is_nothing(run)]  # whatever weighs nothing gives nothing
            if self._depends and len(telling) < 2:
                failed = "it is 0 for all values that were tried"
                nothing = nothing and all(map(self._adds_nothing, runs))
                kinds = [each for each in kinds if (each.integers, each.masks) != (kind.integers, kind.masks)]
                runs = []
                continue
            runs = telling or runs
            if not all(self._is_apart(node, run) for node in self.tail.drawn for run in runs):
                return Verdict(coupling=self.coupling(runs))
            try:
                found = self._found(runs)
            except RuntimeError as error:  # of a backward: what it needs was written to, say
                return Verdict(reason=f"its backward failed: {error}".split("\n")[0])
            if found is not None:
                return Verdict(found, nothing=all(map(self._adds_nothing, runs)))
            if kind.major and has_turns(self.tail):
                continue  # rows may come before samples: that order is tried next
            return Verdict(coupling=self.coupling(runs))
        if runs:
            return Verdict(coupling=self.coupling(runs))
        if nothing and failed.startswith("it is 0"):  # on this path: of an empty mask, say
            return Verdict(candidates(self.tail)[0], nothing=True)
        return Verdict(reason=failed)

    def _found(self, runs: Sequence[Run]) -> Candidate | None:
        """Give the first of the candidates under which the microbatches of all batches add up.

        Those that were moved have the masks and integers of others: they refute, and confirm nothing.
        """
        for candidate in candidates(self.tail):
            held = [self._holds(candidate, run) for run in runs]
            told = [holds for holds, run in zip(held, runs, strict=True) if not run.is_driven]
            if False not in held and told.count(True) >= max(2, told.count(None)):
                return candidate
        return None

    def runs(self, kind: Kind) -> Iterator[Run]:
        """Run several batches, whole and split; those whose value is no number, or that take another path, are out."""
        self.program.floats = kind.floats
        for trial in range(self.given.trials + DRIVEN):
            try:
                whole, parts = self._values(kind, trial)
                done = self._run_whole(whole)
                run = Run((whole, parts), done, self._run_parts(parts, done), trial >= self.given.trials)
            except Unsuited:
                raise
            except Exception:
                if trial == 0:
                    raise
                continue
            if self._same_path(run) and math.isfinite(float(self._value(run.whole, PARTS * self.rows).detach())):
                yield run

    def _values(self, kind: Kind, trial: int) -> tuple[Values, list[Values]]:
        """Give random values; in the last trials those of a trained model."""
        which = trial - self.given.trials
        return self.given.make(kind, trial) if which < 0 else driven(self.given, kind, which, self._slope)

    def _slope(self, whole: Values) -> dict[fx.Node, torch.Tensor]:
        """Give the gradients of what all samples of a batch are first reduced to."""
        env, twins = self._run_whole(whole), self.tail.twins
        leaves = [node for node, value in whole.items() if _is_leaf(value) and twins.sample_dim(node) is not None]
        reduced = (env[node] for node in self.tail.nodes if node in env and twins.is_constant(node))
        for value in filter(_is_leaf, reduced):
            found = dict(zip(leaves, _gradients(value.sum(), [whole[node] for node in leaves]), strict=True))
            parts = zip(*(self.given.parted(*each) for each in found.items()), strict=True)
            if all(any(bool(own.any()) for own in part) for part in parts):
                return found
        return {}

    def _run_whole(self, whole: Values) -> dict[fx.Node, Any]:
        return self.program.run(whole, PARTS * self.rows)

    def _run_parts(self, parts: Sequence[Values], whole: Mapping[fx.Node, Any]) -> list[dict[fx.Node, Any]]:
        """Run the microbatches with what was drawn for the batch: each its samples', or what these share.

        Where that cannot be (an order of the samples, or one of them), each draws for itself.
        """
        values = {node: whole[node] for node in self.tail.draws}
        if values and not any(value.requires_grad for value in values.values()):
            drawn = zip(*(self.given.parted(node, value) for node, value in values.items()), strict=True)
            pairs = [(part, dict(zip(values, own, strict=True))) for part, own in zip(parts, drawn, strict=True)]
            with suppress(IndexError, RuntimeError):
                return [self.program.run(part, self.rows, own) for part, own in pairs]
        return [self.program.run(part, self.rows) for part in parts]

    @property
    def _depends(self) -> bool:
        """Whether the summand depends on what changes from batch to batch, and is not multiplied by 0."""
        node = self.summand.node
        if spoken(node) in ("mul", "imul", "mul_") and any(type(arg) in (int, float) and not arg for arg in node.args):
            return False
        return any(node.op != "get_attr" and info(node).number is None for node in self.tail.sources)

    def _is_nothing(self, run: Run) -> bool:
        """Whether the summand is 0 in a batch and in all of its microbatches."""
        return not any(float(env[self.summand.node].detach().nan_to_num()) for env in (run.whole, *run.parts))

    def _adds_nothing(self, run: Run) -> bool:
        leaves = [value for value in run.given[0].values() if _is_leaf(value)]
        value = self._value(run.whole, PARTS * self.rows)
        return not any(bool(each.any()) for each in (value, *_gradients(value, leaves)))

    def _same_path(self, run: Run) -> bool:
        """Whether Python reads the truth values that it read in the forward."""
        choices = [(node, answer) for node, answer in self.tail.reads if isinstance(answer, bool)]
        return all(answer_of(env[node]) == answer for env in (run.whole, *run.parts) for node, answer in choices)

    def _value(self, env: Mapping[fx.Node, Any], samples: int) -> torch.Tensor:
        """Give the summand as it stands in the loss."""
        value = env[self.summand.node]
        value = value.clone() if self.summand.outer else value  # what scales it may do so in place
        for each in self.summand.outer:
            if each.zero is not None:
                value = -value
            else:
                value = self.program.scaled(each.node, {each.through: value}, env, samples)
        number: torch.Tensor = value.reshape(())
        return number

    def _shares(self, candidate: Candidate, run: Run) -> list[float] | None:
        if candidate.kind == "sum":
            return [1.0] * PARTS
        if candidate.kind == "samples":
            return [1 / PARTS] * PARTS
        assert candidate.count is not None
        try:
            rename = self.program.sizes.identify
            counted = [candidate.count([env[node] for node in candidate.nodes], rename) for env in run.parts]
            whole = candidate.count([run.whole[node] for node in candidate.nodes], rename)
            if not math.isclose(math.fsum(counted), whole, rel_tol=EXACT, abs_tol=1e-12):
                return None
            total = candidate.finish(whole)
            divisors = [candidate.finish(each) for each in counted]
            shares = [each / total if each and math.isfinite(each) else 0.0 for each in divisors]
        except (ArithmeticError, ValueError, RuntimeError, TypeError, IndexError, KeyError):
            return None
        return shares if all(map(math.isfinite, shares)) else None

    def _holds(self, candidate: Candidate, run: Run) -> bool | None:
        """Whether the microbatches' values and gradients, so weighed, are the batch's.

        None where that cannot be told of this batch: nothing counts in a microbatch that adds something. No step
        takes such a batch.
        """
        shares = self._shares(candidate, run)
        if shares is None:
            return False
        left_out = [self._value(env, self.rows) for env, share in zip(run.parts, shares, strict=True) if not share]
        if not all(math.isnan(float(value)) or not float(value) for value in left_out):
            return None
        whole = self._value(run.whole, PARTS * self.rows)
        values = [self._value(env, self.rows) * share for env, share in zip(run.parts, shares, strict=True) if share]
        if not _close(sum(values, torch.zeros(())), whole, [*values, whole]):
            return False
        return self._gradients_agree(run, whole, shares)

    def _gradients_agree(self, run: Run, whole: torch.Tensor, shares: Sequence[float]) -> bool | None:
        leaves = [node for node, value in run.given[0].items() if _is_leaf(value)]
        wanted = _gradients(whole, [run.given[0][node] for node in leaves])
        found: list[list[torch.Tensor]] = []
        for env, given, share in zip(run.parts, run.given[1], shares, strict=True):
            own = [given[node] for node in leaves]
            value = (
                self._value(env, self.rows) * share
            )  # as it is weighed before its backward: a hook may not be linear
            found.append(_gradients(value, own) if share else [torch.zeros_like(x) for x in own])
        for place, node in enumerate(leaves):
            parts = [gradients[place] for gradients in found]
            joined = self.given.joined(node, parts)
            if bool((wanted[place].isfinite() & ~joined.isfinite()).any()):
                return False
            if not torch.equal(joined.isfinite(), wanted[place].isfinite()):
                return None  # some of the model's own are no numbers: where it steps over NaN, say
            joined, wanted[place] = (each.nan_to_num(0.0, 0.0, 0.0) for each in (joined, wanted[place]))
            if not _close(joined, wanted[place], [*wanted, joined]):
                return False
        return True

    def coupling(self, runs: Sequence[Run]) -> fx.Node | None:
        """Give the first call whose value in the batch is neither its microbatches' side by side nor their sum or mean.

        What has several dimensions that grow, or none but a nonlinear origin, couples samples.
        """
        twins = self.tail.twins
        told = (runs[0], *runs[-DRIVEN:])
        tried = candidates(self.tail)
        for node in self.tail.nodes:
            if self._is_written_later(node):
                continue  # its value is what the last of those calls made of it
            value = runs[0].whole[node]
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if node in twins.structure.derived and node is not self.summand.node:
                continue
            if twins.sample_dim(node) is not None:
                if not all(self._is_apart(node, run) for run in told):
                    return node
            elif not twins.is_constant(node) or not any(
                all(self._explains(candidate, run, node) for run in told) for candidate in tried
            ):
                return node
        return next(filter(is_setting, self.tail.nodes), self.summand.node)

    def _is_apart(self, node: fx.Node, run: Run) -> bool:
        """Whether a value of the batch is its microbatches' side by side."""
        at = self.tail.twins.sample_dim(node)
        value, parts = run.whole[node], [env[node] for env in run.parts]
        if at is None:
            return True
        joined = self.given.joined(node, parts) if all(part.dim() > at for part in parts) else None
        return joined is not None and _close(joined.nan_to_num(), value.nan_to_num(), [value.nan_to_num()])

    def _is_written_later(self, node: fx.Node) -> bool:
        storage = find_storage(self.tail.twins.one.recorder.storages, node)
        writers = set(storage.writers) if storage is not None else set()
        return any(each in writers for each in self.tail.nodes[self.tail.nodes.index(node) + 1 :])

    def _explains(self, candidate: Candidate, run: Run, node: fx.Node) -> bool:
        shares = self._shares(candidate, run)
        parts = [env[node] for env in run.parts]
        if shares is None or any(part.shape != run.whole[node].shape for part in parts):
            return False
        weighed = [part * share for part, share in zip(parts, shares, strict=True) if share]
        return _close(sum(weighed, torch.zeros(())), run.whole[node], [*weighed, run.whole[node]])


def _is_leaf(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _gradients(value: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not value.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(value, list(leaves), retain_graph=True, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in pairs]


def _close(found: torch.Tensor, wanted: torch.Tensor, among: Sequence[torch.Tensor]) -> bool:
    """Whether two values differ by no more than rounding of the largest of some."""
    if found.shape != wanted.shape:
        return False
    both = (found - wanted).abs()
    if not both.numel():
        return True
    scale = max((float(each.detach().abs().max()) for each in among if each.numel()), default=0.0)
    return bool(both.isfinite().all()) and float(both.max()) <= EXACT * max(scale, 1e-30)

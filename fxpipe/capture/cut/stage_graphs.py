"""Cut a recorded graph into one graph per stage: a ``Program``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxpipe.capture.cut.placement import Holders as Holders
from fxpipe.capture.cut.placement import place_layers
from fxpipe.capture.graph.layers import layer_of
from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.preserve import without_collection
from fxpipe.capture.record.frames import draw_at, scope_at
from fxpipe.capture.record.node import CONSTANT, info, is_own, made_by, reached, sources
from fxpipe.capture.record.observe import Observation
from fxpipe.ir.tensor import dtype_name
from fxpipe.program import BoundaryTensor, LossTerm, Program, RunInfo, StageProgram, run_info, set_run_info


@without_collection()
def make_program(
    observation: Observation,
    structure: Structure,
    stage_of_layer: Mapping[str, int],
    num_stages: int,
    loss_terms: Sequence[LossTerm] = (),
    holders: Holders | None = None,
) -> Program:
    """Cut a structure into stages.

    Args:
        observation: What the forward did.
        structure: The finished graph.
        stage_of_layer: Stage of each layer of the plan, by name. A layer that the plan does not know (another mask,
            another mode) goes to the first stage that has what it reads.
        num_stages: Number of stages.
        loss_terms: For a loss: its summands, nodes of the structure.
        holders: Stages that hold each tensor of the model, by any of its names. One that is read on a later stage is
            sent along as activations are; without an entry it is taken to be where it is read.

    Returns:
        One graph per stage.

    Raises:
        CaptureError: The graph does not follow the plan: a layer reads what a later stage makes.
    """
    cutter = _Cutter(observation, structure, stage_of_layer, num_stages, holders or {})
    terms = tuple(loss_terms)
    by_name = {node.name: node for node in structure.nodes}
    results = [by_name[term.name] for term in terms] if terms else list(structure.results)
    stages = tuple(cutter.stage(index, results) for index in range(num_stages))
    draw_names = observation.frames.draw_names()
    return Program(
        stages=stages,
        outputs=() if terms else tuple(node.name for node in results),
        rebuild=structure.rebuild,
        loss_terms=terms,
        constants={name: observation.recorder.constants[name] for stage in stages for name in stage.constants},
        drawing=observation.frames.drawing(draw_names),
        draw_names=draw_names,
        overwritten=observation.overwritten,
        loss_dtype=_loss_dtype(observation, results) if terms else None,
    )


def _loss_dtype(observation: Observation, terms: Sequence[fx.Node]) -> torch.dtype | None:
    """Give the dtype of the loss where the sum of its terms has another: one was added to it in place, say."""
    last = info(terms[-1]).tensor
    own = observation.loss.dtype if observation.loss is not None else None
    return own if last is not None and own is not None and last.dtype != dtype_name(own) else None


class _Cutter:
    def __init__(
        self,
        observation: Observation,
        structure: Structure,
        stage_of_layer: Mapping[str, int],
        num_stages: int,
        holders: Holders,
    ) -> None:
        self.observation = observation
        self.structure = structure
        self.num_stages = num_stages
        placed = place_layers(structure, stage_of_layer, num_stages, holders)
        self.order = {node: place for place, node in enumerate(structure.nodes)}
        self.stage_of = {
            node: placed[key]
            for node in structure.nodes
            if node not in structure.derived and (key := layer_of(node)) is not None
        }
        self.draw_names = observation.frames.draw_names()
        self.felt = _felt(structure)
        self.last_reader = self._last_readers()
        self.along: dict[fx.Node, list[tuple[int, int]]] = {}
        if holders:
            self._send_along(holders)

    def _send_along(self, holders: Holders) -> None:
        """Find the tensors of the model that a stage reads and only earlier ones hold: ``along``, from and to."""
        for index in range(self.num_stages):
            own = [node for node, stage in self.stage_of.items() if stage == index]
            results = self.structure.results if index == self.num_stages - 1 else ()
            for node in self._needed(own, results, self.crossing(index - 1) if index else ()):
                stages = holders.get(str(node.target), ()) if is_own(node) else ()
                earlier = [stage for stage in stages if stage < index]
                if earlier and index not in stages:
                    self.along.setdefault(node, []).append((max(earlier), index))

    def _last_readers(self) -> dict[fx.Node, int]:
        """Give the last stage that reads each tensor."""
        last: dict[fx.Node, int] = {}
        for node, stage in self.stage_of.items():
            for source in node.all_input_nodes:
                last[source] = max(last.get(source, 0), stage)
        for node in self.structure.results:
            last[node] = self.num_stages - 1
        return last

    def crossing(self, boundary: int) -> list[fx.Node]:
        """Give the tensors that cross from stage ``boundary`` to the next, in order."""
        made = [node for node, stage in self.stage_of.items() if stage <= boundary < self.last_reader.get(node, -1)]
        along = (node for node, ways in self.along.items() if any(start <= boundary < end for start, end in ways))
        return [*made, *along]

    def stage(self, index: int, results: Sequence[fx.Node]) -> StageProgram:
        """Build the graph of one stage."""
        received = self.crossing(index - 1) if index else []
        sent = self.crossing(index) if index < self.num_stages - 1 else list(results)
        own = [node for node, stage in self.stage_of.items() if stage == index]
        needed = self._needed(own, sent, received)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in received:
            copies[node] = graph.create_node("placeholder", node.name, name=node.name)
        inputs = [node for node in needed if node.op == "placeholder"]
        for node in inputs:
            copies[node] = graph.create_node("placeholder", str(node.target), name=node.name)
        for node in needed:
            if node not in copies:
                copies[node] = self._copied(graph, node, copies)
        given = [copies[node] for node in sent]
        if index < self.num_stages - 1:  # one of the stage's own is sent as it is now, and as a value of its own
            given = [each if each.op != "get_attr" else _made(graph, torch.clone, each) for each in given]
            ends = [self._takes_gradient(node, False) for node in sent]
            given = [_made(graph, torch.detach, each) if end else each for each, end in zip(given, ends, strict=True)]
        graph.output(tuple(given))
        attributes = [str(node.target) for node in needed if node.op == "get_attr"]
        return StageProgram(
            stage_index=index,
            graph=graph,
            received=tuple(map(self._boundary, received)),
            sent=tuple(map(self._boundary, sent)) if index < self.num_stages - 1 else (),
            inputs=tuple(str(node.target) for node in inputs),
            modules=tuple(dict.fromkeys(str(node.target) for node in needed if node.op == "call_module")),
            attributes=tuple(name for name in attributes if not name.startswith(CONSTANT)),
            constants=tuple(name for name in attributes if name.startswith(CONSTANT)),
            draws=any(run_info(node).draws for node in graph.nodes),
        )

    def _needed(self, own: Sequence[fx.Node], sent: Sequence[fx.Node], received: Sequence[fx.Node]) -> list[fx.Node]:
        """Give what a stage runs, in the model's order: its own calls, and what is derived for them."""
        have = set(received)

        def follow(node: fx.Node) -> list[fx.Node]:
            derived = (each for each in sources(node) if each in self.structure.derived or each.op in _READ)
            return [each for each in derived if each not in have]

        needed = reached([*own, *(node for node in sent if node not in have)], follow)
        return sorted(needed, key=self.order.__getitem__)

    def _copied(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        copy = graph.node_copy(node, copies.__getitem__)
        known = info(node)
        draw = scope = None
        if known.frame is not None and known.position is not None:
            draw = draw_at(known.frame, known.position, self.draw_names)
        elif known.frame is not None:
            scope = scope_at(known.frame)
        set_run_info(copy, RunInfo(known.layer, known.context, draw, scope, known.region))
        return copy

    def _boundary(self, node: fx.Node) -> BoundaryTensor:
        known = info(node)
        assert known.tensor is not None
        meta = replace(known.tensor, requires_grad=self._takes_gradient(node, True))
        ends = self._takes_gradient(node, False) and _is_read_with_gradient(node)
        return BoundaryTensor(node.name, meta, known.strides, ends=ends)

    def _takes_gradient(self, node: fx.Node, felt: bool) -> bool:
        """Whether a tensor would take a gradient, and one comes back to it from the results (``felt``) or none does."""
        tensor = info(node).tensor
        return tensor is not None and tensor.requires_grad and (node in self.felt) == felt


def _is_read_with_gradient(node: fx.Node) -> bool:
    """Whether what is computed of a tensor takes a gradient.

    Where nothing does, the tensor may take one itself only since a later write to what it is a view of.
    """
    key = info(node).storage
    users = reached([node], lambda each: each.users if each is node or info(each).storage == key is not None else ())
    return any(_carries(each) for each in users if info(each).storage != key or key is None)


def _made(graph: fx.Graph, function: Callable[..., Any], tensor: fx.Node) -> fx.Node:
    copy = graph.call_function(function, (tensor,))
    set_run_info(copy, run_info(tensor))
    return copy


def _felt(structure: Structure) -> Collection[fx.Node]:
    """Give the nodes that a gradient of the results may reach.

    Where it ends on its way back (codes of a quantizer), the model leaves the gradients before None, and zeros that are
    sent to the stages before would not.
    """

    def follow(node: fx.Node) -> Iterator[fx.Node]:
        call = made_by(node)
        flows = info(call).flows
        if flows is None or (node is not call and node not in flows):
            return filter(_carries, sources(node))
        reads = flows[node] if node in flows else dict.fromkeys(read for each in flows.values() for read in each)
        keys = {info(read).storage for read in reads} - {None}
        seen = (write for write in info(call).after if keys.intersection(info(write).writes))
        return filter(_carries, (*reads, *seen))

    return frozenset(reached(filter(_carries, structure.results), follow))


def _carries(node: fx.Node) -> bool:
    """Whether a gradient may pass a node: on to what a tensor is computed of, or to what was written into one."""
    known = info(node)
    return known.tensor is None or known.tensor.requires_grad or bool(known.writes)


_READ = ("get_attr", "placeholder")

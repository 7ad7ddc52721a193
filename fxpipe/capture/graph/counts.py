"""What may weigh the microbatches of a summand of the loss: candidates, found in the graph, to be tried on values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from fxpipe.capture.graph.reading import reader_of
from fxpipe.capture.graph.sizes import WIDE, Unsuited
from fxpipe.capture.graph.tail import Tail
from fxpipe.capture.graph.twins import Twins, spoken, tensor_of
from fxpipe.capture.model.skeleton import Skeleton
from fxpipe.capture.record.node import function_of, info, is_own, reached
from fxpipe.capture.record.recorder import Recorder, find_storage
from fxpipe.program import LossKind

MOST = 48
"""Candidates that are tried for one summand."""
_ENTROPY = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")


Rename: TypeAlias = Callable[[int], int]


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One way to weigh microbatches.

    Attributes:
        kind: As in ``LossTerm``.
        what: In words, for the report.
        nodes: For ``"tokens"``: what is counted from; depends on inputs and constants alone.
        count: Their values to what adds up over microbatches; the second argument renames classes.
        chain: Calls between the count and what the sum is divided by (a guard against 0, say), in order.
        writes: Calls that write to what ``nodes`` hold: it is counted from that as it is in the end.
    """

    kind: LossKind
    what: str
    nodes: tuple[fx.Node, ...] = ()
    count: Callable[[Sequence[Any], Rename], float] | None = None
    chain: tuple[fx.Node, ...] = ()
    writes: tuple[fx.Node, ...] = ()

    def finish(self, counted: float) -> float:
        """Give what the sum is divided by for a count.

        Raises:
            ValueError: The chain is no function of one number.
        """
        if not self.chain:
            return counted
        before = self.nodes[0] if self.nodes else None
        meta = info(before).tensor if before is not None else None
        dtype = torch.float64 if meta is None else getattr(torch, meta.dtype)  # the graph's own: so it rounds alike
        value: Any = torch.tensor(counted, dtype=torch.get_default_dtype() if dtype in WIDE else dtype)
        for node in self.chain:
            value = _applied(node, before, value)
            before = node
        return float(value)


def candidates(tail: Tail) -> list[Candidate]:
    """List what may weigh the microbatches of a tail's number, the likeliest first."""
    twins = tail.twins
    found = [Candidate("sum", "a sum")]
    found += _entropies(tail)
    derived = [node for node in reversed(tail.nodes) if node in twins.structure.derived or _is_read(tail, node)]
    found += [each for node in derived for each in _scalars(twins, node)]
    found.append(Candidate("samples", "a mean over samples"))
    given = [node for node in tail.sources if node.op == "placeholder"]
    found += [each for node in (*derived, *given) for each in _masks(tail, node)]
    storages, made = twins.one.recorder.storages, set(tail.nodes)

    def with_writes(candidate: Candidate) -> Candidate:
        held = (find_storage(storages, node) for node in candidate.nodes)
        writes = (writer for storage in held if storage is not None for writer in storage.writers if writer in made)
        return replace(candidate, writes=tuple(dict.fromkeys(writes)))

    return list(map(with_writes, found[:MOST]))


def _is_read(tail: Tail, node: fx.Node) -> bool:
    return any(node is read for read, _ in tail.reads)


def _entropies(tail: Tail) -> Iterator[Candidate]:
    """Yield the counts of valid targets of cross entropies."""
    twins = tail.twins
    for node in tail.nodes:
        given = _entropy(twins, node)
        if given is None:
            continue
        target, ignored, weight = given["target"], given.get("ignore_index", -100), given.get("weight")
        if not isinstance(target, fx.Node) or "float" in tensor_of(target).dtype:
            continue
        if target not in twins.structure.derived:
            continue
        if isinstance(weight, fx.Node) and weight not in twins.structure.derived:
            continue
        fixed = weight if isinstance(weight, torch.Tensor) else None
        nodes = (target, weight) if isinstance(weight, fx.Node) else (target,)

        yield Candidate("tokens", "mean over valid targets", nodes, functools.partial(_valid, ignored, fixed))
        if len(nodes) > 1 or fixed is not None:
            plain = functools.partial(_valid, ignored, None)
            yield Candidate("tokens", "mean over valid targets", (target,), plain)


def _valid(ignored: int, weights: torch.Tensor | None, values: Sequence[Any], rename: Rename) -> float:
    is_valid = values[0] != rename(ignored)
    weights = values[1] if len(values) > 1 else weights
    if weights is None:
        return float(torch.count_nonzero(is_valid))
    valid = values[0][is_valid]
    return float(weights.to(valid.device, torch.float64)[valid].sum())


def _entropy(twins: Twins, node: fx.Node) -> dict[str, Any] | None:
    """Give the arguments of a cross entropy over class indices."""
    if spoken(node) in ("cross_entropy", "nll_loss"):
        return {**dict(zip(_ENTROPY, node.args, strict=False)), **node.kwargs}
    if node.op != "call_module" or len(node.args) != 2:
        return None
    module = twins.skeleton.module.get_submodule(str(node.target))
    if not isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss):
        return None
    given: dict[str, Any] = {"target": node.args[1], "ignore_index": module.ignore_index}
    if module.weight is not None:
        original = twins.skeleton.value_of(twins.skeleton.fqn_of.get(id(module.weight), ""))
        if original is not None:
            given["weight"] = original.detach().cpu()
    return given


def _scalars(twins: Twins, node: fx.Node) -> Iterator[Candidate]:
    """Yield a number that is read from inputs, as a function of what adds up."""
    meta = info(node).tensor
    if meta is not None and (meta.numel != 1 or not twins.is_constant(node) or meta.dtype == "bool"):
        return
    if meta is None and node.op != "call_method":
        return
    chain: list[fx.Node] = []
    current = node
    while True:
        inner = [each for each in current.all_input_nodes if each.op != "get_attr"]
        single = len(inner) == 1 and len(current.all_input_nodes) == 1
        meta = info(inner[0]).tensor if single else None
        if not single or meta is None or meta.numel != 1 or not twins.is_constant(inner[0]):
            break
        if spoken(current) == "item":
            break
        chain.insert(0, current)
        current = inner[0]
    for length in range(len(chain), -1, -1):
        first = chain[len(chain) - length - 1] if length < len(chain) else current
        yield Candidate("tokens", "a sum over a count", (first,), _number, tuple(chain[len(chain) - length :]))


def _masks(tail: Tail, node: fx.Node) -> Iterator[Candidate]:
    """Yield the sum of a mask."""
    meta = info(node).tensor
    if meta is None or (meta.numel <= 1 and not meta.shape) or "complex" in meta.dtype:
        return
    if tail.twins.sample_dim(node) is not None:
        yield Candidate("tokens", "a mean over what a mask selects", (node,), _total)
        if node.op == "placeholder" and "float" in meta.dtype and tail.steps_over_nan:
            yield Candidate("tokens", "a mean over what is a number", (node,), _numbers_in)


def _on_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) and value.device.type != "cpu" else value


def _number(values: Sequence[Any], rename: Rename) -> float:
    del rename
    return float(values[0])


def _total(values: Sequence[Any], rename: Rename) -> float:
    del rename
    return float(values[0].double().sum())


def _numbers_in(values: Sequence[Any], rename: Rename) -> float:
    del rename
    return float(torch.count_nonzero(~values[0].isnan()))


def _applied(node: fx.Node, before: fx.Node | None, value: Any) -> Any:
    """Make one call of a chain."""
    args = fx.node.map_arg(node.args, lambda arg: value if arg is before else arg)
    kwargs = fx.node.map_arg(node.kwargs, lambda arg: value if arg is before else arg)
    return function_of(node)(*args, **kwargs)


def counter_of(
    skeleton: Skeleton, recorder: Recorder, candidate: Candidate
) -> Callable[[Mapping[str, Any]], float] | None:
    """Give the function that counts a microbatch from its named inputs; None where nothing is counted.

    Raises:
        Unsuited: It reads a tensor of the model that has no values.
    """
    count = candidate.count
    if count is None:
        return None
    constants, needed = dict(recorder.constants), reached([*candidate.nodes, *candidate.writes])
    for node in needed:
        if is_own(node):
            original = skeleton.value_of(skeleton.aliases.get(str(node.target), ""))
            if original is None:
                raise Unsuited(
                    f"{node.target}, which its microbatches are weighed by, has no values when the model is compiled"
                )
            constants[str(node.target)] = original.detach().cpu()
    read = reader_of(recorder.graph, list(candidate.nodes), constants, also=candidate.writes)
    names = sorted(str(node.target) for node in needed if node.op == "placeholder")

    def counted(inputs: Mapping[str, Any]) -> float:
        return count(read({name: _on_host(inputs[name]) for name in names}), int)

    return counted

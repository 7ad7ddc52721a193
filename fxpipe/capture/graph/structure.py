"""What the recorded graph means: which calls are needed, which can be made again anywhere, which belong together."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpipe.capture.calls.values import filled, storage_of, without_tensors
from fxpipe.capture.model.preserve import without_collection
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.capture.record.node import derives, info, is_setting, reached, sources
from fxpipe.capture.record.observe import Observation
from fxpipe.capture.record.recorder import Storage, find_storage
from fxpipe.errors import CaptureError
from fxpipe.ir.spec import layer_name
from fxpipe.ir.tree import tree_leaves


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """A finished graph.

    Attributes:
        nodes: The calls that are needed, in order, with the placeholders and attributes they read.
        derived: Those that depend on inputs, buffers and constants alone: every stage that reads one makes it itself.
        groups: Calls that must share a stage.
        before: ``(earlier, later)`` pairs of calls whose order matters though no value passes between them.
        results: The nodes whose values leave the graph: the loss, or the tensors the model returns.
        rebuild: Puts the values of ``results`` into the structure that the model returns.
        is_loss: Whether ``results`` is the loss alone.
        given: ``(value, reader)`` pairs: what a block that was opened is given and does not use, and a call of the
            block's. Where the block runs whole after all, it must be given that.
    """

    nodes: tuple[fx.Node, ...]
    derived: frozenset[fx.Node]
    groups: tuple[tuple[fx.Node, ...], ...]
    before: tuple[tuple[fx.Node, fx.Node], ...]
    results: tuple[fx.Node, ...]
    rebuild: Callable[[tuple[Any, ...]], Any]
    is_loss: bool
    given: tuple[tuple[fx.Node, fx.Node], ...] = ()


@without_collection()
def make_structure(
    observation: Observation, *, training: bool, summands: Sequence[fx.Node] = (), whole: Collection[str] = ()
) -> Structure:
    """Find what an observation's graph needs for its loss (``training``) or for what the model returns.

    Args:
        observation: What the forward did.
        training: Whether the loss is wanted, where there is one.
        summands: The nodes that add up to the loss; empty for the loss itself.
        whole: FQNs of blocks that were opened here to be planned, and may run whole.

    Raises:
        CaptureError: The forward writes to an input, or returns one.
    """
    recorder = observation.recorder
    is_loss = training and observation.loss is not None
    if is_loss:
        results = list(summands) or [observation.result_node(observation.loss)]  # type: ignore[arg-type]
        rebuild: Callable[[tuple[Any, ...]], Any] = _first
    else:
        results, rebuild = _outputs(observation)
    live = _live(recorder.graph, results)
    derived = _derived(live, recorder.storages)
    given = _given(observation, live, derived, whole)
    more = list(results)
    while not all(value in live for value, _ in given):  # what makes it may be given something itself
        more += [value for value, _ in given]
        live = _live(recorder.graph, more)
        derived = _derived(live, recorder.storages)
        given = _given(observation, live, derived, whole)
    _check_inputs(live, recorder.storages)
    groups = [*_groups(live, derived, recorder.storages), *_shared_state(live, recorder.skeleton, recorder.storages)]
    return Structure(
        nodes=tuple(live),
        derived=frozenset(derived),
        groups=_tidy(groups, live),
        before=tuple((reader, node) for node in live for reader in info(node).before if reader in live),
        results=tuple(results),
        rebuild=rebuild,
        is_loss=is_loss,
        given=given,
    )


def computation_of(observation: Observation, training: bool, known: Mapping[int, str] | None = None) -> tuple[Any, ...]:
    """Give what a forward computes in a form that is equal for two forwards that compute the same.

    Args:
        observation: What the forward did.
        training: Whether its loss counts, where there is one.
        known: By ``id`` of a constant: what another forward computed it as; see ``expressions_of``.
    """
    structure = make_structure(observation, training=training)
    expressions = _expressions(structure.nodes, observation.recorder.constants, known or {})
    effects = tuple(expressions[node] for node in structure.nodes if info(node).writes or is_setting(node))
    read = (guard for guard in observation.guards if info(guard.node).number is None)
    guards = tuple((guard.where, guard.answer) for guard in read)
    return (tuple(expressions[node] for node in structure.results), effects, guards)


def expressions_of(observation: Observation, tensors: Iterable[torch.Tensor]) -> dict[int, str]:
    """Give, by ``id``, how a forward computed tensors from the model's own tensors and constants alone.

    What depends on an input or on chance, or belongs to no call, is left out.
    """
    recorder, found = observation.recorder, {}
    for tensor in tensors:
        if recorder.made_here(tensor):
            node = recorder.node_of(tensor, observation.frames.all[0])
            needed = reached([node])
            if not any(each.op == "placeholder" or info(each).random or info(each).frame for each in needed):
                ordered = [each for each in recorder.graph.nodes if each in needed]
                found[id(tensor)] = _expressions(ordered, recorder.constants, {})[node]
    return found


def _expressions(
    nodes: Iterable[fx.Node], constants: Mapping[str, Any], known: Mapping[int, str]
) -> dict[fx.Node, str]:
    """Give a digest of each node: of what is called with what, and of the writes it sees."""
    found: dict[fx.Node, str] = {}

    def spell(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            number = info(argument).number
            return found[argument] if number is None else repr(number)
        if isinstance(argument, tuple | list):
            return (type(argument).__name__, *map(spell, argument))
        if isinstance(argument, dict):
            return ("dict", *((key, spell(item)) for key, item in argument.items()))
        if isinstance(argument, slice):
            return ("slice", spell(argument.start), spell(argument.stop), spell(argument.step))
        return repr(argument)

    for node in nodes:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__qualname__", "")
        constant = constants.get(target)
        if constant is not None and id(constant) in known:
            found[node] = known[id(constant)]
            continue
        target = repr(constant) if constant is not None else target
        after = tuple(found[each] for each in info(node).after)
        line = (node.op, target, spell(node.args), spell(node.kwargs), info(node).context, after)
        found[node] = hashlib.blake2b(repr(line).encode(), digest_size=16).hexdigest()
    return found


def _first(tensors: tuple[Any, ...]) -> Any:
    return tensors[0]


def _outputs(observation: Observation) -> tuple[list[fx.Node], Callable[[tuple[Any, ...]], Any]]:
    """Give the nodes of the tensors that the model returns, and what puts them back into their containers."""
    recorder = observation.recorder
    inputs = {info(node).storage: node for node in recorder.graph.nodes if node.op == "placeholder"}
    for path, leaf in tree_leaves(observation.output):
        source = inputs.get(storage_of(leaf)) if isinstance(leaf, torch.Tensor) else None
        if source is not None:
            raise CaptureError(
                f"{path or 'the output'} is the input {source.target!r} itself, or a view of it\n"
                "  return a copy (.clone()), or leave it out of what the model returns"
            )
    template, tensors = without_tensors(observation.output)
    return [observation.result_node(tensor) for tensor in tensors], functools.partial(filled, template)


def _live(graph: fx.Graph, results: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Give the nodes that the results need, in order: what they read, and the writes that reading sees."""
    lasting = {info(node).storage for node in graph.nodes if node.op == "get_attr"} - {None}
    start = [*results, *(node for node in graph.nodes if lasting.intersection(info(node).writes))]
    start += [node for node in graph.nodes if node.op == "call_module" and info(node).writes]
    hooks = [node for node in graph.nodes if is_setting(node)]
    needed = reached(start)
    while more := [hook for hook in hooks if hook not in needed and hook.args[0] in needed]:
        needed = reached([*needed, *more])
    return {node: None for node in graph.nodes if node in needed}


def _derived(live: Mapping[fx.Node, None], storages: Mapping[int, Storage]) -> set[fx.Node]:
    """Give the nodes that depend on inputs, buffers and constants alone, writes to their storages included."""
    derived: set[fx.Node] = set()
    for node in live:
        if derives(node) and all(source in derived for source in sources(node)):
            derived.add(node)
    changed = True
    while changed:
        changed = False
        for storage in storages.values():
            writers = [node for node in storage.writers if node in live]
            lasting = any(node.op == "get_attr" for node in storage.aliases)
            if writers and (lasting or not all(node in derived for node in writers)):
                lost = {node for node in (*storage.aliases, *writers) if node in derived and node.op != "placeholder"}
                changed |= bool(lost)
                derived -= lost
        for node in live:
            if node in derived and not all(source in derived for source in sources(node)):
                derived.discard(node)
                changed = True
    return derived


def _given(
    observation: Observation, live: Mapping[fx.Node, None], derived: Collection[fx.Node], whole: Collection[str]
) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """Give what blocks are given and do not use, each with a call of the block's.

    A block of which all is derived is opened at any grain, and reads what it uses alone.
    """
    frames = [frame for frame in observation.frames.all if frame.given and frame.fqn in whole]
    if not frames:
        return ()
    members: dict[str, list[fx.Node]] = {}
    for node in live:
        if node not in derived and _is_call(node) and info(node).layer:
            members.setdefault(info(node).block, []).append(node)
    everything = set(observation.recorder.graph.nodes)  # without what was tried and taken back
    found = []
    for frame in frames:
        inside = members.get(layer_name(frame.block, frame.block_call), [])
        own = set(inside)

        def follow(node: fx.Node, own: Collection[fx.Node] = own) -> tuple[fx.Node, ...]:
            return sources(node) if node in own or node in derived or info(node).container else ()

        used = reached(inside, follow)
        unused = (node for node in frame.given if node not in used and node in everything and node.op != "placeholder")
        found += [(node, inside[0]) for node in unused if inside]
    return tuple(found)


def _check_inputs(live: Iterable[fx.Node], storages: Mapping[int, Storage]) -> None:
    for node in live:
        if node.op != "placeholder":
            continue
        storage = find_storage(storages, node)
        for writer in storage.writers if storage is not None else ():
            raise CaptureError(
                f"the forward writes to its input {node.target!r} ({info(writer).layer}, {info(writer).where})\n"
                "  write to a copy: x = x.clone()"
            )


def _groups(
    live: Mapping[fx.Node, None], derived: set[fx.Node], storages: Mapping[int, Storage]
) -> list[list[fx.Node]]:
    """Give the sets of calls that share a stage: a write with all that aliases what it writes to, hooks, objects."""
    groups: list[list[fx.Node]] = []
    order = {node: place for place, node in enumerate(live)}
    for storage in storages.values():
        writers = [node for node in storage.writers if node in live and node not in derived]
        if not writers:
            continue
        lasting = any(node.op == "get_attr" for node in storage.aliases)
        last = max(order[node] for node in writers)
        touching = [*writers, *(node for node in storage.aliases if node in live and order[node] <= last)]
        touching += [node for node in storage.readers if node in live] if lasting else []
        groups.append(touching)
    for node in live:
        if is_setting(node) or node.target in ("as_strided", torch.as_strided):  # memory beyond the tensor's own
            groups.append([node, *(source for source in node.all_input_nodes if source not in derived)])
        if info(node).shared_object:
            groups.append([node, *(user for user in node.users if user in live)])
    return groups


def _shared_state(
    live: Mapping[fx.Node, None], skeleton: Skeleton, storages: Mapping[int, Storage]
) -> Iterator[list[fx.Node]]:
    """Yield the calls of modules with a tensor of the model that some call writes to, with the writers."""
    written = {key: [node for node in storage.writers if node in live] for key, storage in storages.items()}
    written = {key: writers for key, writers in written.items() if writers}
    if not written:
        return
    holders: dict[int, list[str]] = {}
    for fqn, tensor in named_tensors(skeleton.module):
        key = storage_of(tensor)
        if key in written:
            holders.setdefault(key, []).append(fqn)
    for key, fqns in holders.items():
        calls = [
            node for node in live if node.op == "call_module" and any(fqn.startswith(f"{node.target}.") for fqn in fqns)
        ]
        yield [*written[key], *calls]


def _tidy(groups: Sequence[Sequence[fx.Node]], live: Mapping[fx.Node, None]) -> tuple[tuple[fx.Node, ...], ...]:
    """Leave only calls, in order, and each group once."""
    order = {node: place for place, node in enumerate(live)}
    kept = (tuple(sorted({node for node in group if _is_call(node)}, key=order.__getitem__)) for group in groups)
    return tuple(dict.fromkeys(group for group in kept if len(group) > 1))


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method", "call_module")

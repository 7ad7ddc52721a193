"""From a recorded graph to the ordered graph of layers that is planned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from fxpipe.capture.graph.structure import Structure
from fxpipe.capture.model.preserve import without_collection
from fxpipe.capture.model.skeleton import Skeleton, named_tensors
from fxpipe.capture.record.node import info, is_activation, is_own, sources
from fxpipe.capture.record.recorder import Storage, find_storage
from fxpipe.ir.canonical import import_path
from fxpipe.ir.cost import LayerCounts
from fxpipe.ir.graph import LayerGraph, SavedTensor, Tie, Value
from fxpipe.ir.spec import LayerSpec, TensorInfo

Key = tuple[str, int]


def layer_of(node: fx.Node) -> Key | None:
    """Give name and call number of the layer that a node belongs to; None for inputs, attributes and guards."""
    known = info(node)
    return (known.layer, known.call) if known.layer else None


@dataclass(frozen=True, slots=True, eq=False)
class Layers:
    """The layers of a structure, in the order of their first calls.

    Attributes:
        keys: Name and call number of each.
        nodes: The calls of each, in order.
        index_of: Layer by node.
    """

    keys: tuple[Key, ...]
    nodes: tuple[tuple[fx.Node, ...], ...]
    index_of: Mapping[fx.Node, int]


def find_layers(structure: Structure) -> Layers:
    """Sort the calls of a structure into layers."""
    members: dict[Key, list[fx.Node]] = {}
    for node in structure.nodes:
        key = layer_of(node)
        if key is not None:
            members.setdefault(key, []).append(node)
    index_of = {node: index for index, nodes in enumerate(members.values()) for node in nodes}
    return Layers(tuple(members), tuple(map(tuple, members.values())), index_of)


@without_collection()
def make_layer_graph(
    skeleton: Skeleton,
    structure: Structure,
    *,
    blocks: Collection[str],
    storages: Mapping[int, Storage],
    inputs: Sequence[str] = (),
    batch_size: int | None = None,
    notes: Sequence[str] = (),
) -> LayerGraph:
    """Turn a recorded graph into layers, the tensors between them, and their ties.

    Every parameter and buffer belongs to one layer, or is tied; those of modules that are never called belong to
    layers of their own, at the end, in the stage of their neighbours in the module tree: where another path through
    the model calls them, it will most likely find there what they read.

    Args:
        skeleton: The copy of the model.
        structure: What its forward did, as far as it is needed.
        blocks: FQNs of the model's blocks.
        storages: The memory that the values of nodes lie in, by ``NodeInfo.storage``.
        inputs: Description of each input of one microbatch.
        batch_size: Samples per microbatch.
        notes: What the report should say.

    Returns:
        The graph, with the counts of the calls where they were counted.
    """
    layers = find_layers(structure)
    uses = _uses(skeleton, structure, layers)
    mains = [_main(nodes) for nodes in layers.nodes]
    taken = {name for key, node in zip(layers.keys, mains, strict=True) for name in (key[0], info(node).block)}
    unused = _unused(skeleton, uses, blocks, taken)
    ties = _ties(skeleton, [*uses, *unused.values()])
    tie_of = {fqn: tie.key for tie in ties if len(tie.fqns) > 1 or len(tie.layers) > 1 for fqn in tie.fqns}
    specs = [_spec(skeleton, key, mains[i], uses[i], tie_of) for i, key in enumerate(layers.keys)]
    specs += [_unused_spec(skeleton, fqn, used, tie_of) for fqn, used in unused.items()]
    derived = {layers.index_of[node] for node in structure.derived if node in layers.index_of}
    edges, free_edges = _edges(structure, layers, derived)
    groups = [tuple(dict.fromkeys(layers.index_of[node] for node in group)) for group in structure.groups]
    groups += _beside(skeleton, layers, derived, list(unused))
    return LayerGraph(
        name=type(skeleton.module).__name__,
        specs=tuple(specs),
        values=tuple(_values(structure, layers, derived)),
        edges=edges,
        free_edges=free_edges,
        recomputed=tuple(sorted(derived)),
        groups=tuple(group for group in groups if len(group) > 1),
        blocks=tuple(info(node).block for node in mains) + ("",) * len(unused),
        ties=tuple(tie for tie in ties if tie.key in tie_of),
        counts=tuple(_counts(nodes) for nodes in layers.nodes) + (LayerCounts(),) * len(unused),
        saved=_saved(storages, layers),
        operations=tuple(i for i, spec in enumerate(specs) if not _is_module(skeleton, mains, i, spec.fqn)),
        inputs=tuple(inputs),
        batch_size=batch_size,
        notes=tuple(notes),
    )


def _is_module(skeleton: Skeleton, mains: Sequence[fx.Node], index: int, fqn: str) -> bool:
    """Say whether a layer is a module of the model."""
    if index < len(mains):
        return mains[index].op == "call_module"
    try:  # one that is never called
        skeleton.module.get_submodule(fqn)
    except AttributeError:
        return False
    return True


def _main(nodes: Sequence[fx.Node]) -> fx.Node:
    """Give the call that a layer is named after: what puts its arguments together comes before it."""
    return next((node for node in nodes if not info(node).container), nodes[0])


def _counts(nodes: Sequence[fx.Node]) -> LayerCounts:
    return next((counts for node in nodes if (counts := info(node).counts) is not None), LayerCounts())


def _saved(storages: Mapping[int, Storage], layers: Layers) -> tuple[SavedTensor, ...]:
    """Give the tensors between layers that layers keep for their backward, views as what they are views of."""
    keepers: dict[fx.Node, dict[int, None]] = {}
    for index, nodes in enumerate(layers.nodes):
        for node in nodes:
            known = info(node)
            for kind, position in known.counts.saved_values if known.counts is not None else ():
                source = (known.reads if kind == "input" else known.made)[position]
                root = _storage_root(storages, source)
                if is_activation(root):
                    keepers.setdefault(root, {})[index] = None
    return tuple(
        SavedTensor(node.name, tensor, tuple(found))
        for node, found in keepers.items()
        if (tensor := info(node).tensor) is not None
    )


def _storage_root(storages: Mapping[int, Storage], node: fx.Node) -> fx.Node:
    """Give the node that made the memory a value lies in."""
    storage = find_storage(storages, node)
    return storage.aliases[0] if storage is not None and storage.aliases else node


def _uses(skeleton: Skeleton, structure: Structure, layers: Layers) -> list[dict[str, None]]:
    """Give for each layer the FQNs of the parameters and buffers that it uses, under the names they have there."""
    given: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in structure.given:
        given.setdefault(reader, []).append(value)
    return [_tensors_used(skeleton, nodes, given) for nodes in layers.nodes]


def _tensors_used(
    skeleton: Skeleton, nodes: Sequence[fx.Node], given: Mapping[fx.Node, Sequence[fx.Node]]
) -> dict[str, None]:
    used: dict[str, None] = {}
    for node in nodes:
        if node.op == "call_module":
            module = skeleton.module.get_submodule(str(node.target))
            used.update({f"{node.target}.{name}": None for name, _ in named_tensors(module)})
        for read in (*node.all_input_nodes, *given.get(node, ())):
            if is_own(read):
                used[str(read.target)] = None
    return used


def _unused(
    skeleton: Skeleton, uses: Sequence[Mapping[str, None]], blocks: Collection[str], taken: Collection[str]
) -> dict[str, dict[str, None]]:
    """Give the tensors that no layer uses under any name, by the block they are in or the module that holds them.

    They have these names in every capture of a model, whatever is opened in it: a block of which nothing is called is
    one layer, of others each module is.

    Where that is a layer or a block already, each tensor stands by itself: a name means one thing.
    """
    reached = {skeleton.aliases[fqn] for used in uses for fqn in used}
    opened = {name[:at] for name in taken for at, letter in enumerate(name) if letter == "."}
    unused: dict[str, dict[str, None]] = {}
    for fqn in skeleton.infos:
        if fqn not in reached:
            parents = fqn.split(".")[:-1]
            prefixes = (".".join(parents[:length]) for length in range(1, len(parents) + 1))
            owner = next((each for each in prefixes if each in blocks and each not in opened), ".".join(parents) or fqn)
            unused.setdefault(fqn if owner in taken else owner, {})[fqn] = None
    return unused


def _beside(
    skeleton: Skeleton, layers: Layers, derived: Collection[int], unused: Sequence[str]
) -> list[tuple[int, ...]]:
    """Give the groups that hold each unused layer, after all others, in the stage of its neighbour.

    That is what its module's nearest sibling before it does last, else what the nearest one behind it does first, else
    likewise for the module around them.
    """
    reach: dict[str, tuple[int, int]] = {}  # by FQN: first and last layer inside
    for index, (fqn, _) in enumerate(layers.keys):
        if index not in derived:
            parts = fqn.split(".")
            for length in range(len(parts) + 1):
                prefix = ".".join(parts[:length])
                reach[prefix] = (reach.get(prefix, (index, index))[0], index)
    groups: dict[int, list[int]] = {}
    for place, fqn in enumerate(unused, len(layers.keys)):
        groups.setdefault(_neighbour(skeleton, fqn, reach), []).append(place)
    return [(neighbour, *places) for neighbour, places in groups.items() if neighbour >= 0]


def _neighbour(skeleton: Skeleton, fqn: str, reach: Mapping[str, tuple[int, int]]) -> int:
    parts = fqn.split(".")
    for depth in reversed(range(len(parts))):
        around = ".".join(parts[:depth])
        names = [name for name, _ in skeleton.module.get_submodule(around).named_children()]
        place = names.index(parts[depth]) if parts[depth] in names else 0
        paths = [f"{around}.{name}" if around else name for name in names]
        before = next((reach[path][1] for path in reversed(paths[:place]) if path in reach), None)
        found = (
            before if before is not None else next((reach[path][0] for path in paths[place:] if path in reach), None)
        )
        if found is not None:
            return found
        if around in reach:
            return reach[around][0]
    return -1


def _ties(skeleton: Skeleton, uses: Sequence[Mapping[str, None]]) -> tuple[Tie, ...]:
    """Describe every tensor that has several names, or that several layers use."""
    names: dict[str, list[str]] = {}
    for fqn, first in skeleton.aliases.items():
        names.setdefault(first, []).append(fqn)
    users: dict[str, list[int]] = {}
    for index, used in enumerate(uses):
        for first in dict.fromkeys(skeleton.aliases[fqn] for fqn in used):
            users.setdefault(first, []).append(index)
    ties = []
    for first, tensor in skeleton.infos.items():
        layers = users.get(first, [])
        if len(names[first]) > 1 or len(layers) > 1:
            ties.append(Tie(first, tuple(names[first]), tuple(layers), tensor.nbytes, tensor.trainable))
    return tuple(ties)


def _spec(
    skeleton: Skeleton, key: Key, node: fx.Node, used: Mapping[str, None], tie_of: Mapping[str, str]
) -> LayerSpec:
    if node.op == "call_module":
        type_path = import_path(type(skeleton.module.get_submodule(str(node.target))))
    else:
        type_path = str(node.target) if isinstance(node.target, str) else _function_path(node.target)
    return _captured(skeleton, key[0], type_path, key[1], used, tie_of)


def _unused_spec(skeleton: Skeleton, fqn: str, used: Mapping[str, None], tie_of: Mapping[str, str]) -> LayerSpec:
    try:
        type_path = import_path(type(skeleton.module.get_submodule(fqn)))
    except AttributeError:  # a parameter of the model itself
        type_path = import_path(nn.Parameter)
    return _captured(skeleton, fqn, type_path, 0, used, tie_of)


def _captured(
    skeleton: Skeleton, fqn: str, type_path: str, call: int, used: Mapping[str, None], tie_of: Mapping[str, str]
) -> LayerSpec:
    infos = [_renamed(skeleton, name) for name in used]
    parameters = tuple(info for info, is_parameter in infos if is_parameter)
    buffers = tuple(info for info, is_parameter in infos if not is_parameter)
    ties = tuple((tie_of[name], name.removeprefix(f"{fqn}.")) for name in used if name in tie_of)
    return LayerSpec.captured(
        fqn, type_path, call=call, parameters=parameters, buffers=buffers, ties=ties, handle=skeleton
    )


def _renamed(skeleton: Skeleton, fqn: str) -> tuple[TensorInfo, bool]:
    """Give what is known of a tensor under one of its names, and whether it is a parameter."""
    info = skeleton.infos[skeleton.aliases[fqn]]
    owner, _, leaf = fqn.rpartition(".")
    is_parameter = leaf in skeleton.module.get_submodule(owner)._parameters
    return TensorInfo(fqn, info.shape, info.dtype, info.nbytes, info.trainable, info.persistent), is_parameter


def _function_path(target: object) -> str:
    path = import_path(target)
    return path if "<" not in path else getattr(target, "__name__", "function")


def _edges(
    structure: Structure, layers: Layers, derived: set[int]
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Give the pairs of layers that are ordered, and those whose earlier one is recomputed."""
    ordered: dict[tuple[int, int], None] = {}
    free: dict[tuple[int, int], None] = {}
    for node, reader in layers.index_of.items():
        for source in sources(node):
            producer = layers.index_of.get(source)
            if producer is not None and producer != reader:
                (free if producer in derived else ordered)[producer, reader] = None
    for source, node in structure.given:
        producer, reader = layers.index_of.get(source), layers.index_of[node]
        if producer is not None and producer != reader:
            (free if producer in derived else ordered)[producer, reader] = None
    for earlier, later in structure.before:
        first, second = layers.index_of.get(earlier), layers.index_of.get(later)
        if first is not None and second is not None and first != second and not derived & {first, second}:
            ordered[first, second] = None
    return tuple(sorted(ordered)), tuple(sorted(free))


def _values(structure: Structure, layers: Layers, derived: set[int]) -> Iterator[Value]:
    """Yield the tensors that other layers read; what leaves the graph is read by the last layer."""
    results = set(structure.results)
    given: dict[fx.Node, set[int]] = {}
    for node, reader in structure.given:
        given.setdefault(node, set()).add(layers.index_of[reader])
    last = len(layers.keys) - 1
    for node, producer in layers.index_of.items():
        tensor = info(node).tensor
        if tensor is None or producer in derived:
            continue
        readers = {layers.index_of[user] for user in node.users if user in layers.index_of}
        readers |= given.get(node, set())
        readers |= {last} if node in results else set()
        readers.discard(producer)
        if readers:
            yield Value(node.name, producer, tuple(sorted(readers)), tensor)

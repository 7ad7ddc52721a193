"""Bytes a rank needs: what each layer, each value between layers and each shared tensor adds to a stage.

What a stage holds, on the runtime of ``torch.distributed.pipelining``:

- per parameter: the weight, its gradient (in ``grad_dtype`` where that is wider), the optimiser's state, a master
  weight. Under FSDP2 the gradient stays whole until the step ends, the rest is sharded, and the stages in work hold
  their weights whole besides. A tensor that several layers use is held once per rank.
- per live microbatch: what autograd keeps, each tensor once per stage, and what the stage received and sent (a value
  that is only passed on counts as both).
- besides: one buffer for what is received next, one gradient that comes back for each value sent, one that goes back
  for each value received.

A recomputed module keeps what enters it, and one of them at a time has its activations and, in its backward, the
largest gradient on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fxpipe.ir.graph import LayerGraph, Value
from fxpipe.ir.hardware import OPTIMIZER_STATES, Training
from fxpipe.ir.spec import TensorInfo
from fxpipe.ir.tensor import dtype_bytes
from fxpipe.planning.costs.precision import Precision
from fxpipe.planning.costs.recompute import checkpoints, recomputed_modules


@dataclass(frozen=True, slots=True)
class Shared:
    """What every rank, or every stage, holds once if it has any of the layers.

    Attributes:
        key: First FQN of a tensor, else what it is.
        layers: Indices of the layers.
        bytes: Static bytes, once per rank.
        live_bytes: Bytes per live microbatch, once per stage.
        gradient_bytes: Bytes of the gradient that holders add up; 0 for what has none.
        is_working: Whether it is what one recomputed module at a time needs, not a tensor.
    """

    key: str
    layers: tuple[int, ...]
    bytes: int = 0
    live_bytes: int = 0
    gradient_bytes: int = 0
    is_working: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of one value between layers.

    Attributes:
        by_producer: Bytes per live microbatch that the producer's stage keeps wherever its readers are.
        sent: Bytes per live microbatch that a stage keeps for sending it on.
        received: Bytes per live microbatch of a stage that received it.
        sent_buffer: Fixed bytes of a stage that sends it on.
        received_buffer: Fixed bytes of a stage that receives it.
    """

    by_producer: int
    sent: int
    received: int
    sent_buffer: int
    received_buffer: int


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of a graph's parts.

    Attributes:
        static: Static bytes of each layer, of tensors no other layer uses.
        activation: Bytes per live microbatch of each layer.
        shared: What several layers hold together.
        values: For each value of the graph, its bytes.
    """

    static: tuple[int, ...]
    activation: tuple[int, ...]
    shared: tuple[Shared, ...]
    values: tuple[Kept, ...]


def parameter_bytes(info: TensorInfo, training: Training, precision: Precision) -> int:
    """Give the bytes a rank needs for one parameter: weight, gradient, optimiser state, master weight.

    Under FSDP2 the whole weight besides: torch keeps the stages in work unsharded, three at a time; a rank of more
    stages needs somewhat less than this says.

    >>> weight = TensorInfo("w", (1000,), "bfloat16", 2000, trainable=True)
    >>> parameter_bytes(weight, Training(), Precision("bfloat16", "bfloat16"))  # 2 + 4 + 2 × 2 bytes
    10000
    """
    numel = math.prod(info.shape)
    width = dtype_bytes(precision.parameter(info))
    weight = numel * width
    if not info.trainable:
        return _sharded(weight, training) + (weight if _shards(training) else 0)
    state = OPTIMIZER_STATES[training.optimizer] * numel * _width(training.state_dtype, width)
    master = 4 * numel if training.master_weights and width < 4 else 0
    kept = _sharded(weight + state + master, training)
    return kept + gradient_bytes(info, training, precision) + (weight if _shards(training) else 0)


def gradient_bytes(info: TensorInfo, training: Training, precision: Precision) -> int:
    """Give the bytes of a parameter's accumulated gradient."""
    width = dtype_bytes(precision.parameter(info))
    return math.prod(info.shape) * max(width, dtype_bytes(training.grad_dtype)) if info.trainable else 0


def _shards(training: Training) -> bool:
    return training.fsdp and training.data_parallel > 1


def _sharded(nbytes: int, training: Training) -> int:
    return -(-nbytes // training.data_parallel) if _shards(training) else nbytes


def _width(dtype: str | None, width: int) -> int:
    return width if dtype is None else dtype_bytes(dtype)


def layer_memory(graph: LayerGraph, training: Training, precision: Precision) -> LayerMemory:
    """Add up what each part of a graph needs."""
    readers = readers_of_recomputed(graph)
    static = [0] * len(graph.specs)
    shared = []
    for tensor in _tensors(graph, training, precision, readers):
        if len(tensor.layers) == 1:
            static[tensor.layers[0]] += tensor.bytes
        else:
            shared.append(tensor)
    savers = _savers(graph)
    block_of = checkpoints(graph, recomputed_modules(graph, training.recompute))
    activation = [_as_run(graph, layer, "saved_bytes", precision) for layer in range(len(graph.specs))]
    inside: dict[str, int] = {}
    largest: dict[str, int] = {}
    for layer, name in block_of.items():
        inside[name] = inside.get(name, 0) + activation[layer]
        largest[name] = max(largest.get(name, 0), _as_run(graph, layer, "gradient_bytes", precision))
        activation[layer] = 0
    values = []
    for value in graph.values:
        meta = precision.meta(value.meta)
        if value.producer in readers:  # made anew by every stage that reads it
            layers = _spread(savers.get(value.name, ()), readers)
            shared += [Shared(value.name, layers, live_bytes=meta.nbytes)] if layers else []
            values.append(Kept(0, 0, 0, 0, 0))
            continue
        block = block_of.get(value.producer)
        kept = _is_kept(value, savers.get(value.name, ()), block_of)
        if block is not None and value.name in savers and not kept:
            inside[block] += meta.nbytes
        gradient = meta.nbytes if meta.requires_grad else 0
        values.append(
            Kept(meta.nbytes if kept else 0, 0 if kept else meta.nbytes, meta.nbytes, gradient, meta.nbytes + gradient)
        )
    known = {value.name for value in graph.values}
    for saved in graph.saved:
        layers = _spread(saved.layers, readers)
        if saved.name not in known and layers:
            shared.append(Shared(saved.name, layers, live_bytes=precision.meta(saved.meta).nbytes))
    shared += _working_blocks(block_of, {name: nbytes + largest[name] for name, nbytes in inside.items()})
    for layer, needers in readers.items():
        if activation[layer] and needers:
            shared.append(Shared(graph.specs[layer].layer_name, needers, live_bytes=activation[layer]))
    return LayerMemory(tuple(static), tuple(activation), tuple(shared), tuple(values))


def readers_of_recomputed(graph: LayerGraph) -> dict[int, tuple[int, ...]]:
    """Give for each recomputed layer the other layers that need it, directly or through recomputed ones."""
    free = frozenset(graph.recomputed)
    after: dict[int, list[int]] = {}
    for earlier, later in graph.free_edges:
        after.setdefault(earlier, []).append(later)
    found = {}
    for layer in graph.recomputed:
        needers: set[int] = set()
        seen = {layer}
        todo = [layer]
        while todo:
            for later in after.get(todo.pop(), ()):
                if later in free and later not in seen:
                    seen.add(later)
                    todo.append(later)
                elif later not in free:
                    needers.add(later)
        found[layer] = tuple(sorted(needers))
    return found


def _spread(layers: Iterable[int], readers: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Put those that need a recomputed layer in its place."""
    return tuple(sorted({needer for layer in layers for needer in readers.get(layer, (layer,))}))


def _tensors(
    graph: LayerGraph, training: Training, precision: Precision, readers: Mapping[int, tuple[int, ...]]
) -> list[Shared]:
    """Give every parameter and buffer once, with the layers that use it."""
    keys = {fqn: tie.key for tie in graph.ties for fqn in tie.fqns}
    users: dict[str, set[int]] = {tie.key: set(_spread(tie.layers, readers)) for tie in graph.ties}
    sizes: dict[str, tuple[int, int]] = {}
    for layer, spec in enumerate(graph.specs):
        for is_parameter, infos in ((True, spec.parameters), (False, spec.buffers)):
            for info in infos:
                key = keys.get(info.fqn, info.fqn)
                users.setdefault(key, set()).update(_spread((layer,), readers))
                if is_parameter:
                    sizes[key] = parameter_bytes(info, training, precision), gradient_bytes(info, training, precision)
                else:
                    sizes.setdefault(key, (info.nbytes, 0))
    return [
        Shared(key, tuple(sorted(layers)), bytes=sizes[key][0], gradient_bytes=sizes[key][1])
        for key, layers in users.items()
        if key in sizes and layers
    ]


def _as_run(graph: LayerGraph, layer: int, what: Literal["saved_bytes", "gradient_bytes"], precision: Precision) -> int:
    """Give a layer's bytes in the dtype that it runs in."""
    if not graph.counts:
        return 0
    counts = graph.counts[layer]
    nbytes: int = getattr(counts, what)
    computes = any(op.dtype == precision.captured for op in counts.ops)
    return precision.nbytes(nbytes, precision.captured) if computes else nbytes


def _savers(graph: LayerGraph) -> dict[str, tuple[int, ...]]:
    """Give for each value the layers whose backward needs it.

    Without ``graph.saved``, positions alone are known: a layer that keeps as many inputs as it reads values keeps all
    of them, one that keeps fewer the largest ones; likewise for its outputs.
    """
    if graph.saved or not graph.counts:
        return {saved.name: saved.layers for saved in graph.saved}
    reads: dict[int, list[Value]] = {}
    makes: dict[int, list[Value]] = {}
    for value in graph.values:
        makes.setdefault(value.producer, []).append(value)
        for reader in value.readers:
            reads.setdefault(reader, []).append(value)
    found: dict[str, list[int]] = {}
    for layer, counts in enumerate(graph.counts):
        for kind, values in (("input", reads.get(layer, [])), ("output", makes.get(layer, []))):
            kept = sum(saved[0] == kind for saved in counts.saved_values)
            for value in sorted(values, key=lambda value: -value.meta.nbytes)[:kept]:
                found.setdefault(value.name, []).append(layer)
    return {name: tuple(layers) for name, layers in found.items()}


def _is_kept(value: Value, savers: Sequence[int], block_of: Mapping[int, str]) -> bool:
    """Tell whether a backward needs a value: one outside checkpoints, or a checkpoint as its input."""
    own = block_of.get(value.producer)
    enters = any(block_of.get(reader) not in (None, own) for reader in value.readers)
    return enters or any(layer not in block_of for layer in savers)


def _working_blocks(block_of: Mapping[int, str], inside: Mapping[str, int]) -> list[Shared]:
    """Give what one block at a time needs besides, the largest of a rank's blocks, as a sum of steps.

    A rank holds a step if it has any block at least as large.
    """
    steps = []
    below = 0
    for size in sorted({nbytes for nbytes in inside.values() if nbytes}):
        layers = tuple(sorted(layer for layer, block in block_of.items() if inside[block] >= size))
        key = f"blocks of {size} bytes and more, recomputed"
        steps.append(Shared(key, layers, bytes=size - below, is_working=True))
        below = size
    return steps

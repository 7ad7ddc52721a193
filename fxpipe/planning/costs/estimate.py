"""Seconds of every layer: from its counts, from its weights, from measured times, or from the user's own numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fxpipe.errors import PartitionError
from fxpipe.ir.cost import LayerCost, LayerCounts, OpCount, Phase
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.hardware import Hardware, Training
from fxpipe.ir.profile import Profile, line_through
from fxpipe.ir.units import seconds_text
from fxpipe.planning.costs.precision import Precision, precision_of
from fxpipe.planning.costs.recompute import recomputed_modules, with_recompute

COSTS = ("parameters", "flops", "roofline", "profile")
MOST_TYPES = 6  # of layers, that a note names


@dataclass(frozen=True, slots=True)
class Estimate:
    """What every layer costs.

    Attributes:
        costs: Seconds of each layer for one microbatch.
        cost: Name of the cost model.
        notes: What the report should say about it.
        is_time: Whether the seconds are times, so that those of links may be added to them.
    """

    costs: tuple[LayerCost, ...]
    cost: str
    notes: tuple[str, ...] = ()
    is_time: bool = True


def estimate_costs(
    graph: LayerGraph, cost: str | Profile | Mapping[str, float], hardware: Hardware, training: Training
) -> Estimate:
    """Estimate the seconds of every layer for one microbatch.

    - ``"roofline"``: each operation takes as long as its FLOPs at the peak rate of its dtype, or its bytes at the
      memory's bandwidth, whichever is longer.
    - ``"flops"``: FLOPs at the peak rate; operations without a formula count by their bytes.
    - ``"parameters"``: bytes of weights at the memory's bandwidth, once forward and twice backward; no time.
    - a ``Profile``: measured times, by layer name.
    - a mapping from FQN to seconds, forward and backward of one microbatch: of a layer, or of a module whose layers
      share them by their FLOPs. The nearest enclosing FQN counts. Calls of functions outside of every module named may
      be left out: they count nothing, and the notes name them.

    ``training.param_dtype`` changes the dtype of the operations and their bytes (not of measured times), and
    ``training.recompute`` adds the forward of every layer in a recomputed module to its backward. Equal layers share
    one ``LayerCounts``, and each is estimated once.

    Args:
        graph: The layers; counted, unless the cost is ``"parameters"``, a profile or a mapping.
        cost: One of the above.
        hardware: Rates.
        training: Dtypes and recomputation.

    Returns:
        Seconds of each layer.

    Raises:
        PartitionError: The cost is unknown, the layers are not counted, or a mapping leaves an FQN out, names one that
            is not there, or holds something that is no time.
    """
    precision = precision_of(graph, training)
    if isinstance(cost, Profile):
        costs = _measured(graph, cost)
        notes = (f"times measured on {cost.device}", *_links_note(cost), *_roofline_note(graph, costs, hardware))
        estimate = Estimate(costs, "profile", notes)
    elif isinstance(cost, Mapping):
        estimate = _given(graph, cost)
    elif cost == "parameters":
        estimate = Estimate(
            _by_parameters(graph, precision, hardware),
            cost,
            ("cost=parameters weighs layers by their parameters: its seconds are no times, and links are not priced",),
            is_time=False,
        )
    elif cost in ("flops", "roofline"):
        seconds_of = _roofline_s if cost == "roofline" else _flops_s
        estimate = Estimate(_by_counts(graph, precision, hardware, seconds_of), cost, _uncounted_notes(graph))
    elif cost == "profile":
        raise PartitionError(
            'cost="profile" needs measured times\n  measure them on the device that trains, or read them from a file'
        )
    else:
        raise PartitionError(
            f"unknown cost {cost!r}\n  known: {', '.join(COSTS)}, or a mapping from FQN to seconds of one microbatch"
        )
    modules = recomputed_modules(graph, training.recompute)
    return replace(estimate, costs=with_recompute(graph, estimate.costs, modules)) if modules else estimate


def _by_counts(
    graph: LayerGraph,
    precision: Precision,
    hardware: Hardware,
    seconds_of: Callable[[OpCount, LayerCounts, Precision, Hardware], float],
) -> tuple[LayerCost, ...]:
    if len(graph.counts) != len(graph.specs):
        raise PartitionError(
            f"the {len(graph.specs)} layers of {graph.name} are not counted\n"
            '  give example_args, so that shapes are known, or use cost="parameters"'
        )
    known: dict[int, LayerCost] = {}
    for counts in graph.counts:
        if id(counts) not in known:
            phases: dict[Phase, list[float]] = {"forward": [], "input_grad": [], "weight_grad": []}
            for op in counts.ops:
                phases[op.phase].append(seconds_of(op, counts, precision, hardware))
            known[id(counts)] = LayerCost(*(math.fsum(seconds) for seconds in phases.values()))
    return tuple(known[id(counts)] for counts in graph.counts)


def _roofline_s(op: OpCount, counts: LayerCounts, precision: Precision, hardware: Hardware) -> float:
    return max(_compute_s(op, precision, hardware), _memory_s(op, precision, hardware))


def _flops_s(op: OpCount, counts: LayerCounts, precision: Precision, hardware: Hardware) -> float:
    if not op.flops and op.name in counts.uncounted:
        return _memory_s(op, precision, hardware)
    return _compute_s(op, precision, hardware)


def _compute_s(op: OpCount, precision: Precision, hardware: Hardware) -> float:
    return op.flops / hardware.peak_flops(precision.dtype(op.dtype)) if op.flops else 0.0


def _memory_s(op: OpCount, precision: Precision, hardware: Hardware) -> float:
    return precision.nbytes(op.bytes, op.dtype) / hardware.memory_bandwidth


def _uncounted_notes(graph: LayerGraph) -> tuple[str, ...]:
    names = sorted({name for counts in {id(c): c for c in graph.counts}.values() for name in counts.uncounted})
    if not names:
        return ()
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (f"no FLOP formula, counted by their bytes: {', '.join(names[:8])}{more}",)


def _by_parameters(graph: LayerGraph, precision: Precision, hardware: Hardware) -> tuple[LayerCost, ...]:
    seen: set[str] = set()
    costs = []
    for spec in graph.specs:
        own = {info.fqn: info for info in spec.parameters if info.fqn not in seen}  # a module called twice weighs once
        seen.update(own)
        size = sum(precision.nbytes(info.nbytes, info.dtype) for info in own.values())
        once = size / hardware.memory_bandwidth
        costs.append(LayerCost(once, once, once))
    return tuple(costs)


def _given(graph: LayerGraph, seconds: Mapping[str, float]) -> Estimate:
    for fqn, value in seconds.items():
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        if not (math.isfinite(number) and number >= 0):
            raise PartitionError(f"cost of {fqn!r} is {value!r}\n  give a finite number of seconds >= 0")
    names = graph.layer_names
    keys = [_nearest(name, seconds) for name in names]
    needed = _working_layers(graph)
    left_out = [layer for layer in range(len(names)) if keys[layer] is None and layer in needed]
    missing = [names[layer] for layer in left_out if not _is_function(graph, layer)]
    if missing:
        raise PartitionError(
            f"cost leaves out {_listed(missing)}\n  give the seconds of every layer, or of a module it lies in"
        )
    there = {fqn for name in names for fqn in _enclosing(name)}
    unknown = [fqn for fqn in seconds if fqn not in there]
    if unknown:
        raise PartitionError(
            f"cost names {_listed(unknown)}, not in {graph.name}\n  use FQNs of layers or of modules they lie in: "
            f"{_listed(list(names))}"
        )
    members: dict[str, list[int]] = {}
    for layer, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(layer)
    costs = [LayerCost(0.0)] * len(names)
    for key, layers in members.items():
        for layer, share in zip(layers, _shares(graph, layers), strict=True):
            costs[layer] = _split(graph, layer, float(seconds[key]) * share)
    free = _listed([names[layer] for layer in left_out])
    notes = (f"cost names no seconds of {free}: counted as nothing",) if left_out else ()
    return Estimate(tuple(costs), "given", notes)


def _is_function(graph: LayerGraph, layer: int) -> bool:
    """Tell whether a layer is the call of a function, by the name of what it is: classes begin with a capital."""
    spec = graph.specs[layer]
    return not spec.parameters and not spec.type_path.rpartition(":")[2].rpartition(".")[2][:1].isupper()


def _measured(graph: LayerGraph, profile: Profile) -> tuple[LayerCost, ...]:
    """Give measured times; a module's are shared by its layers, and those of parts added up."""
    known = profile.costs
    names = graph.layer_names
    keys = [_nearest(name, known) for name in names]
    costs = [LayerCost(0.0)] * len(names)
    members: dict[str, list[int]] = {}
    missing = []
    needed = _working_layers(graph)
    parts: dict[str, list[LayerCost]] = {}
    for name, cost in known.items():
        for fqn in _enclosing(name):
            parts.setdefault(fqn, []).append(cost)
    for layer, key in enumerate(keys):
        if key is not None:
            members.setdefault(key, []).append(layer)
        elif names[layer] in parts:
            costs[layer] = _added(parts[names[layer]])
        elif layer in needed:
            missing.append(names[layer])
    if missing:
        raise PartitionError(f"the profile has no times of {_listed(missing)}\n  measure this model, at this grain")
    for key, layers in members.items():
        for layer, share in zip(layers, _shares(graph, layers), strict=True):
            cost = known[key]
            costs[layer] = LayerCost(cost.forward_s * share, cost.input_grad_s * share, cost.weight_grad_s * share)
    return tuple(costs)


def _links_note(profile: Profile) -> tuple[str, ...]:
    found = []
    for name, far in (("links", False), ("links between nodes", True)):
        line = line_through([link for link in profile.links if link.far is far])
        if line is not None:
            found.append(f"{name} as measured: {line[0] / 1e9:.3g} GB/s, {seconds_text(line[1])} latency")
    return tuple(found)


def _roofline_note(graph: LayerGraph, costs: Sequence[LayerCost], hardware: Hardware) -> tuple[str, ...]:
    """Say how far the roofline of the hardware is off, by type of layer, those that take longest first."""
    if len(graph.counts) != len(graph.specs):
        return ()
    precision = precision_of(graph, Training())
    expected = _by_counts(graph, precision, hardware, _roofline_s)
    sums: dict[str, tuple[float, float]] = {}
    for spec, cost, other in zip(graph.specs, costs, expected, strict=True):
        name = spec.type_path.rpartition(":")[2].rpartition(".")[2]
        real, roofline = sums.get(name, (0.0, 0.0))
        sums[name] = real + cost.seconds, roofline + other.seconds
    known = [(real, name, real / roofline) for name, (real, roofline) in sums.items() if real > 0 and roofline > 0]
    if not known:
        return ()
    known.sort(key=lambda entry: (-entry[0], entry[1]))
    shown = ", ".join(f"{name} {ratio:.2g}" for _, name, ratio in known[:MOST_TYPES])
    return (f"measured over the roofline of {hardware.name}, by type of layer: {shown}",)


def _added(parts: Sequence[LayerCost]) -> LayerCost:
    return LayerCost(
        math.fsum(part.forward_s for part in parts),
        math.fsum(part.input_grad_s for part in parts),
        math.fsum(part.weight_grad_s for part in parts),
    )


def _working_layers(graph: LayerGraph) -> set[int]:
    """Give the layers that need a time: those that are neither recomputed nor known to do nothing."""
    idle = {layer for layer, counts in enumerate(graph.counts) if not counts.ops}
    return set(range(len(graph.specs))) - set(graph.recomputed) - idle


def _enclosing(name: str) -> list[str]:
    """Give a layer's name, that of the module without the number of its call, and those of the modules around it.

    >>> _enclosing("h.0.attn@1")
    ['h.0.attn@1', 'h.0.attn', 'h.0', 'h', '']
    """
    fqn = name.partition("@")[0]
    parts = fqn.split(".") if fqn else []
    around = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return around if name == fqn else [name, *around]


def _nearest(name: str, known: Mapping[str, object]) -> str | None:
    return next((fqn for fqn in _enclosing(name) if fqn in known), None)


def _shares(graph: LayerGraph, layers: Sequence[int]) -> list[float]:
    """Share one by FLOPs, else by bytes, else evenly; recomputed layers have no part in it."""
    if len(layers) == 1:
        return [1.0]
    amounts = [[1.0] * len(layers)]
    if graph.counts:
        amounts.insert(0, [float(graph.counts[layer].bytes()) for layer in layers])
        amounts.insert(0, [float(graph.counts[layer].flops()) for layer in layers])
    free = set(graph.recomputed)
    for row in amounts:
        own = [0.0 if layer in free else amount for layer, amount in zip(layers, row, strict=True)]
        total = math.fsum(own)
        if total > 0:
            return [amount / total for amount in own]
    return [0.0] * len(layers)


def _split(graph: LayerGraph, layer: int, seconds: float) -> LayerCost:
    """Split forward and backward by the FLOPs of the phases, else as 1 : 1 : 1."""
    if graph.counts:
        counts = graph.counts[layer]
        for work in (counts.flops, counts.bytes):
            total = work()
            if total:
                forward, input_grad = (seconds * work(phase) / total for phase in ("forward", "input_grad"))
                return LayerCost(forward, input_grad, max(seconds - forward - input_grad, 0.0))
    return LayerCost(seconds / 3, seconds / 3, seconds / 3)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more

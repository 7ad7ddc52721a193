"""What a plan is computed for: the accelerator with its links, and the way of training.

Peak rates are dense (no structured sparsity). Sources of the presets, one direction of a link, per accelerator:

- ``h100``, ``h200``: NVIDIA H100 and H200 data sheets, SXM (NVLink 4: 900 GB/s both ways); DGX H100: 400 Gb/s each.
- ``b200``: NVIDIA DGX B200 and HGX B200 data sheets (NVLink 5: 1.8 TB/s both ways; 400 Gb/s each).
- ``a100``, ``a100-80gb``, ``a100-40gb``: NVIDIA A100 data sheet, SXM (NVLink 3: 600 GB/s both ways); DGX A100:
  200 Gb/s each.
- ``l4``, ``l40s``: NVIDIA L4 and L40S data sheets (PCIe 4.0 x16: 64 GB/s both ways); across nodes 100 Gb/s assumed.
- ``rtx4090``: NVIDIA Ada GPU architecture white paper, appendix A (float32 accumulation; PCIe 4.0 x16); across nodes
  10 Gb/s assumed.
- ``mi300x``: AMD Instinct MI300X data sheet (Infinity Fabric: 128 GB/s both ways to each peer; 400 Gb/s each).
- ``cpu``: a server core complex of modest size, rounded; links as measured for gloo on one machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxpipe.errors import PlanError
from fxpipe.ir.tensor import dtype_bytes, dtype_name

OPTIMIZER_STATES: dict[str, int] = {
    "adamw": 2,
    "adam": 2,
    "nadam": 2,
    "lion": 1,
    "muon": 1,
    "sgd-momentum": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
    "none": 0,
}
"""Tensors as large as the weight that each optimiser keeps."""

RECOMPUTE = ("block", "attention", "auto")
"""Ways of choosing what is recomputed in the backward, besides FQN patterns."""


class PeakFlops(Mapping[str, float]):
    """Peak FLOP/s by dtype name: an immutable, hashable mapping in sorted order."""

    __slots__ = ("_pairs",)
    _pairs: tuple[tuple[str, float], ...]

    def __init__(self, rates: Mapping[str, float]) -> None:
        object.__setattr__(self, "_pairs", tuple(sorted((str(k), float(v)) for k, v in rates.items())))

    def __getitem__(self, dtype: str) -> float:
        for name, rate in self._pairs:
            if name == dtype:
                return rate
        raise KeyError(dtype)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"PeakFlops is immutable; cannot set {name}")

    def __reduce__(self) -> tuple[type[PeakFlops], tuple[dict[str, float]]]:
        return (PeakFlops, (dict(self),))

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator and its links to others.

    Attributes:
        flops: Peak FLOP/s by dtype name; ``"tf32"`` is for the reader alone.
        memory_bandwidth: Bytes per second.
        memory: Bytes.
        link_bandwidth: Bytes per second to the next rank in the node, one direction; ``inf`` for free links.
        link_latency: Seconds of one message to the next rank in the node.
        name: Name of the preset, or of the user's own.
        node_size: Ranks in one node; 0 when all ranks are in one.
        internode_bandwidth: Bytes per second to a rank in another node; None for ``link_bandwidth``.
        internode_latency: Seconds of one message to another node; None for ``link_latency``.
        device: ``"cuda"`` or ``"cpu"``: whose kernels run (it decides whether attention is fused).

    Raises:
        PlanError: A rate, a size or a dtype name is not one.

    >>> mine = Hardware(flops={"bfloat16": 400e12}, memory_bandwidth=2e12, memory=64e9)
    >>> mine.peak_flops("float16"), mine.transfer_s(1e9)
    (400000000000000.0, 0.0)
    """

    flops: Mapping[str, float]
    memory_bandwidth: float
    memory: float
    link_bandwidth: float = math.inf
    link_latency: float = 0.0
    name: str = "custom"
    node_size: int = 0
    internode_bandwidth: float | None = None
    internode_latency: float | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        if not isinstance(self.flops, Mapping) or not self.flops:
            raise PlanError(
                f'hardware {self.name!r}: flops is {self.flops!r}\n  give FLOP/s by dtype, {{"bfloat16": 989e12}}'
            )
        rates = {name if name == "tf32" else _dtype(name, "flops"): rate for name, rate in self.flops.items()}
        for name, rate in rates.items():
            _check_positive(rate, f"hardware {self.name!r}: flops[{name!r}]", "FLOP/s")
        object.__setattr__(self, "flops", PeakFlops(rates))
        _check_positive(self.memory_bandwidth, f"hardware {self.name!r}: memory_bandwidth", "bytes/s", infinite=True)
        _check_positive(self.memory, f"hardware {self.name!r}: memory", "bytes", infinite=True)
        for field, unit in (("link_bandwidth", "bytes/s"), ("internode_bandwidth", "bytes/s")):
            if getattr(self, field) is not None:
                _check_positive(getattr(self, field), f"hardware {self.name!r}: {field}", unit, infinite=True)
        for field in ("link_latency", "internode_latency"):
            if getattr(self, field) is not None:
                _check_positive(getattr(self, field), f"hardware {self.name!r}: {field}", "seconds", zero=True)
        if not isinstance(self.node_size, int) or self.node_size < 0:
            raise PlanError(
                f"hardware {self.name!r}: node_size is {self.node_size!r}\n  give ranks per node, 0 for one node"
            )
        if self.device not in ("cuda", "cpu"):
            raise PlanError(f'hardware {self.name!r}: device is {self.device!r}\n  known: "cuda", "cpu"')

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """Give the preset called ``name``.

        Raises:
            PlanError: No preset has that name; the message lists them.

        >>> Hardware.preset("h100").memory_bandwidth
        3350000000000.0
        """
        if not isinstance(name, str) or name not in _PRESETS:
            raise PlanError(
                f"unknown hardware {name!r}\n"
                f"  known: {', '.join(sorted(_PRESETS))}; or give a Hardware value or a file NAME.toml"
            )
        return _PRESETS[name]

    def peak_flops(self, dtype: str) -> float:
        """Give the FLOP/s for ``dtype``.

        A dtype that is not listed runs at the rate of the narrowest listed one at least as wide, so 8-bit floats
        without units of their own run as bfloat16; one wider than all listed runs slower by the ratio of the widths.
        """
        if dtype in self.flops:
            return self.flops[dtype]
        width = min(dtype_bytes(dtype), 8)
        listed = sorted((dtype_bytes(name), -rate) for name, rate in self.flops.items() if name != "tf32")
        if not listed:
            return next(iter(self.flops.values()))
        for listed_width, negative_rate in listed:
            if listed_width >= width:
                return -negative_rate
        return -listed[-1][1] * listed[-1][0] / width

    def link(self, rank: int = 0, other_rank: int = 1) -> tuple[float, float]:
        """Give bandwidth (bytes/s) and latency (s) between two ranks, numbered node by node."""
        if self.node_size and rank // self.node_size != other_rank // self.node_size:
            bandwidth = self.link_bandwidth if self.internode_bandwidth is None else self.internode_bandwidth
            latency = self.link_latency if self.internode_latency is None else self.internode_latency
            return bandwidth, latency
        return self.link_bandwidth, self.link_latency

    def transfer_s(self, nbytes: float, rank: int = 0, other_rank: int = 1) -> float:
        """Give the seconds of one message of ``nbytes`` between two ranks; 0 for none, or within a rank."""
        if nbytes <= 0 or rank == other_rank:
            return 0.0
        bandwidth, latency = self.link(rank, other_rank)
        return latency + nbytes / bandwidth

    def all_reduce_s(self, nbytes: float, ranks: tuple[int, ...]) -> float:
        """Give the seconds of a ring all-reduce of ``nbytes`` over ``ranks``, over its slowest link.

        >>> Hardware.preset("h100").all_reduce_s(450e9, (0, 3))
        1.00001
        """
        num_ranks = len(set(ranks))
        if num_ranks < 2 or nbytes <= 0:
            return 0.0
        ring = sorted(set(ranks))
        links = [self.link(rank, ring[(place + 1) % num_ranks]) for place, rank in enumerate(ring)]
        steps = 2 * (num_ranks - 1)
        return max(steps * latency + steps * nbytes / num_ranks / bandwidth for bandwidth, latency in links)


@dataclass(frozen=True, slots=True)
class Training:
    """How the model is trained: what memory and step time are computed for.

    Attributes:
        optimizer: A key of ``OPTIMIZER_STATES``: ``"adamw"``, ``"sgd"``, ``"none"``, …
        param_dtype: Dtype of the weights, None for the model's own; torch's dtypes are accepted and kept by name.
        grad_dtype: Dtype gradients accumulate in, where it is wider than the weight's.
        recompute: Whose activations are not kept, but computed anew in the backward (activation checkpointing): None,
            ``"block"``: of every repeated block; ``"attention"``: of the innermost modules that call attention or
            softmax, and of a block without one whole; a list of FQN patterns (``"model.layers.*.mlp"``); or ``"auto"``:
            chosen per stage with the cut.
        data_parallel: Replicas of the pipeline.
        state_dtype: Dtype of the optimiser's state, None for the weight's.
        master_weights: Whether the optimiser keeps a float32 copy of narrower weights.
        fsdp: Whether weights, gradients and state are sharded over the replicas (FSDP2).

    Raises:
        PlanError: Unknown optimiser, dtype or way of recomputation, or ``data_parallel`` below 1.

    >>> Training(param_dtype="torch.bfloat16").param_dtype
    'bfloat16'
    """

    optimizer: str = "adamw"
    param_dtype: str | None = None
    grad_dtype: str = "float32"
    recompute: str | tuple[str, ...] | None = None
    data_parallel: int = 1
    state_dtype: str | None = None
    master_weights: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZER_STATES:
            raise PlanError(
                f"training: unknown optimizer {self.optimizer!r}\n  known: {', '.join(sorted(OPTIMIZER_STATES))}"
            )
        for field in ("param_dtype", "grad_dtype", "state_dtype"):
            value = getattr(self, field)
            if value is not None or field == "grad_dtype":
                object.__setattr__(self, field, _dtype(value, f"training: {field}"))
        object.__setattr__(self, "recompute", _recompute(self.recompute))
        if isinstance(self.data_parallel, bool) or not isinstance(self.data_parallel, int) or self.data_parallel < 1:
            raise PlanError(
                f"training: data_parallel is {self.data_parallel!r}\n  give the number of replicas, 1 or more"
            )


def _dtype(value: object, where: str) -> str:
    try:
        return dtype_name(value)
    except ValueError as error:
        raise PlanError(f"{where}: {error}") from error


def _recompute(value: object) -> str | tuple[str, ...] | None:
    if value is None or (isinstance(value, str) and value in RECOMPUTE):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(pattern, str) and pattern for pattern in value):
        return tuple(value)
    words = ", ".join(f'"{word}"' for word in RECOMPUTE)
    raise PlanError(f"training: unknown recompute {value!r}\n  known: None, {words}, or a list of FQN patterns")


def _check_positive(value: object, where: str, unit: str, *, zero: bool = False, infinite: bool = False) -> None:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (number > 0 or (zero and number == 0)) or (math.isinf(number) and not infinite):
        raise PlanError(f"{where} is {value!r}\n  give a positive number of {unit}")


_PRESETS = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            flops={
                "float8_e4m3fn": 1979e12,
                "float8_e5m2": 1979e12,
                "bfloat16": 989e12,
                "float16": 989e12,
                "tf32": 494e12,
                "float32": 67e12,
                "float64": 67e12,
            },
            memory_bandwidth=3.35e12,
            memory=80e9,
            link_bandwidth=450e9,
            link_latency=5e-6,
            name="h100",
            node_size=8,
            internode_bandwidth=50e9,
            internode_latency=10e-6,
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 1979e12,
                "float8_e5m2": 1979e12,
                "bfloat16": 989e12,
                "float16": 989e12,
                "tf32": 494e12,
                "float32": 67e12,
                "float64": 67e12,
            },
            memory_bandwidth=4.8e12,
            memory=141e9,
            link_bandwidth=450e9,
            link_latency=5e-6,
            name="h200",
            node_size=8,
            internode_bandwidth=50e9,
            internode_latency=10e-6,
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 4500e12,
                "float8_e5m2": 4500e12,
                "bfloat16": 2250e12,
                "float16": 2250e12,
                "tf32": 1100e12,
                "float32": 75e12,
                "float64": 37e12,
            },
            memory_bandwidth=8e12,
            memory=180e9,
            link_bandwidth=900e9,
            link_latency=5e-6,
            name="b200",
            node_size=8,
            internode_bandwidth=50e9,
            internode_latency=10e-6,
        ),
        *(
            Hardware(
                flops={
                    "bfloat16": 312e12,
                    "float16": 312e12,
                    "tf32": 156e12,
                    "float32": 19.5e12,
                    "float64": 19.5e12,
                },
                memory_bandwidth=bandwidth,
                memory=memory,
                link_bandwidth=300e9,
                link_latency=5e-6,
                name=name,
                node_size=8,
                internode_bandwidth=25e9,
                internode_latency=10e-6,
            )
            for name, memory, bandwidth in (
                ("a100", 80e9, 2.039e12),
                ("a100-80gb", 80e9, 2.039e12),
                ("a100-40gb", 40e9, 1.555e12),
            )
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 242e12,
                "float8_e5m2": 242e12,
                "bfloat16": 121e12,
                "float16": 121e12,
                "tf32": 60e12,
                "float32": 30.3e12,
                "float64": 0.47e12,
            },
            memory_bandwidth=300e9,
            memory=24e9,
            link_bandwidth=32e9,
            link_latency=10e-6,
            name="l4",
            node_size=8,
            internode_bandwidth=12.5e9,
            internode_latency=15e-6,
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 733e12,
                "float8_e5m2": 733e12,
                "bfloat16": 362e12,
                "float16": 362e12,
                "tf32": 183e12,
                "float32": 91.6e12,
                "float64": 1.43e12,
            },
            memory_bandwidth=864e9,
            memory=48e9,
            link_bandwidth=32e9,
            link_latency=10e-6,
            name="l40s",
            node_size=8,
            internode_bandwidth=12.5e9,
            internode_latency=15e-6,
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 330e12,
                "float8_e5m2": 330e12,
                "bfloat16": 165e12,
                "float16": 165e12,
                "tf32": 82.6e12,
                "float32": 82.6e12,
                "float64": 1.29e12,
            },
            memory_bandwidth=1.008e12,
            memory=24e9,
            link_bandwidth=32e9,
            link_latency=15e-6,
            name="rtx4090",
            node_size=8,
            internode_bandwidth=1.25e9,
            internode_latency=30e-6,
        ),
        Hardware(
            flops={
                "float8_e4m3fn": 2614e12,
                "float8_e5m2": 2614e12,
                "bfloat16": 1307e12,
                "float16": 1307e12,
                "tf32": 653e12,
                "float32": 163e12,
                "float64": 163e12,
            },
            memory_bandwidth=5.3e12,
            memory=192e9,
            link_bandwidth=64e9,
            link_latency=5e-6,
            name="mi300x",
            node_size=8,
            internode_bandwidth=50e9,
            internode_latency=10e-6,
        ),
        Hardware(
            flops={"bfloat16": 2e11, "float16": 2e11, "float32": 2e11, "float64": 1e11},
            memory_bandwidth=40e9,
            memory=32e9,
            link_bandwidth=5e9,
            link_latency=50e-6,
            name="cpu",
            device="cpu",
        ),
    )
}

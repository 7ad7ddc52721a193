"""What a plan is computed for: the accelerator with its links, and the way of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxpipe.errors import PlanError


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
    """One accelerator and its link to the next.

    Attributes:
        flops: Peak FLOP/s by dtype name.
        memory_bandwidth: Bytes per second.
        memory: Bytes.
        link_bandwidth: Bytes per second to the next rank, one direction; ``inf`` for free links.
        link_latency: Seconds.
        name: Name of the preset, or of the user's own.
    """

    flops: Mapping[str, float]
    memory_bandwidth: float
    memory: float
    link_bandwidth: float = math.inf
    link_latency: float = 0.0
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "flops", PeakFlops(self.flops))

    @classmethod
    def preset(cls, name: str) -> Hardware:
        """Give the preset called ``name``.

        Raises:
            PlanError: No preset has that name; the message lists them.
        """
        if name not in _PRESETS:
            raise PlanError(
                f"unknown hardware {name!r}\n  known: {', '.join(sorted(_PRESETS))}; or give a Hardware value"
            )
        return _PRESETS[name]


@dataclass(frozen=True, slots=True)
class Training:
    """How the model is trained: what memory and step time are computed for.

    Attributes:
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"sgd-momentum"`` or ``"none"``.
        param_dtype: Dtype of the weights, None for the model's own.
        grad_dtype: Dtype gradients accumulate in.
        recompute: None, or ``"block"``: activation checkpointing of every block.
        data_parallel: Replicas of the pipeline.
    """

    optimizer: str = "adamw"
    param_dtype: str | None = None
    grad_dtype: str = "float32"
    recompute: str | None = None
    data_parallel: int = 1


_PRESETS = {
    "h100": Hardware(
        {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float64": 67e12}, 3.35e12, 80e9, 450e9, 5e-6, "h100"
    ),
    "cpu": Hardware({"bfloat16": 2e11, "float32": 2e11, "float64": 1e11}, 40e9, 32e9, 5e9, 50e-6, "cpu"),
}

"""The state around a call: gradients, inference, autocast, attention, and what a call has that the forward had not."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fxpipe._torch import attention_kernels
from fxpipe.program import AutocastState, CallContext


@dataclass(frozen=True, slots=True)
class Ambient:
    """Gradient, inference and autocast state around the forward, and the kernels that attention may take, in order."""

    grad_enabled: bool
    inference: bool
    autocast: tuple[AutocastState, ...]
    attention: tuple[str, ...]

    @classmethod
    def now(cls) -> Ambient:
        """Read the current state."""
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast(), _names(attention_kernels()))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the gradient mode, and the CPU's autocast, as they were."""
        cpu = self.autocast[0]
        with (
            torch.set_grad_enabled(self.grad_enabled),
            torch.autocast("cpu", getattr(torch, cpu.dtype), cpu.enabled, cpu.cache_enabled),
        ):
            yield

    def difference(self) -> CallContext | None:
        """Give what is different now, None for nothing."""
        now = Ambient.now()
        if now == self:
            return None
        changed = tuple(state for state in now.autocast if state not in self.autocast)
        grad = None if now.grad_enabled == self.grad_enabled else now.grad_enabled
        attention = None if now.attention == self.attention else now.attention
        return CallContext(grad, now.inference and not self.inference, changed, attention)


@functools.cache
def _names(kernels: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(kernel.name for kernel in kernels)  # of an enumeration, slowly


def _autocast() -> tuple[AutocastState, ...]:
    caches = torch.is_autocast_cache_enabled()
    return tuple(
        [
            _state(name, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type), caches)
            for device_type, name in (("cpu", ""), ("cuda", "cuda"))
        ]
    )


@functools.cache
def _state(name: str, enabled: bool, dtype: torch.dtype, caches: bool) -> AutocastState:
    return AutocastState(name, enabled, str(dtype).removeprefix("torch."), caches)


@contextmanager
def mirrored_ambient() -> Iterator[Ambient]:
    """Give the state around the forward; autocast of an accelerator is mirrored to the CPU, where capture runs.

    A forward asks ``x.device.type`` which autocast to switch off, and hears ``"cpu"`` during capture.
    """
    mirrored = next((kind for kind in ("cuda", "xpu") if torch.is_autocast_enabled(kind)), None)
    if mirrored is None or torch.is_autocast_enabled("cpu"):
        yield Ambient.now()
        return
    dtype = torch.get_autocast_dtype(mirrored)
    with torch.autocast("cpu", dtype=dtype, cache_enabled=torch.is_autocast_cache_enabled()):
        yield Ambient.now()

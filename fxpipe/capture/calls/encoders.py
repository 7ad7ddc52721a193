"""What ``nn.TransformerEncoder`` does without gradients: its fast path leaves out what is padded.

That path goes through nested tensors, which a graph cannot hold; what it gives is the other path's result with zeros
where the padding mask says so. Whether torch takes it is asked of torch's own forward, which is stopped where it has
decided; no condition of it is written down here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxpipe._torch import encoder_decisions, replaced


class _Fast(BaseException):
    """The encoder has decided for its fast path."""


class _Other(BaseException):
    """The encoder has begun with its layers, on the path that is recorded as it is."""


class _Asked(nn.ModuleList):
    def __iter__(self) -> Iterator[nn.Module]:
        raise _Other


@contextmanager
def padded_encoders(passes: Callable[[], bool]) -> Iterator[None]:
    """Let encoders give what their fast path gives.

    Args:
        passes: Whether nothing is recorded now.
    """
    real = nn.TransformerEncoder.forward

    def forward(encoder: nn.TransformerEncoder, src: Any, *args: Any, **kwargs: Any) -> Any:
        checks: list[torch.Tensor] = []
        if passes() or torch.is_grad_enabled() or not _is_fast(real, checks, encoder, src, *args, **kwargs):
            return real(encoder, src, *args, **kwargs)
        mask = kwargs["src_key_padding_mask"] if "src_key_padding_mask" in kwargs else args[1]
        norm = encoder.norm
        if norm is not None:
            encoder._modules["norm"] = None
        try:
            result = real(encoder, src, *args, **kwargs)
        finally:
            if norm is not None:
                encoder._modules["norm"] = norm
        padded = mask if mask.dtype == torch.bool else mask != 0
        for valid in checks:  # where padding is not at the end of each row, torch takes the other path
            padded = padded & (valid[:, 1:] <= valid[:, :-1]).all()
        result = result.masked_fill(padded.unsqueeze(-1), 0.0)
        return norm(result) if norm is not None else result

    with replaced(nn.TransformerEncoder, "forward", forward):
        yield


def _is_fast(
    real: Callable[..., Any], checks: list[torch.Tensor], encoder: nn.TransformerEncoder, *args: Any, **kwargs: Any
) -> bool:
    """Ask the encoder's own forward; masks of which it looks at the values go into ``checks``, and pass."""

    def passed(_: torch.Tensor, valid: torch.Tensor) -> bool:
        checks.append(valid)
        return True

    layers = encoder._modules["layers"]
    encoder._modules["layers"] = _Asked(encoder.layers)
    try:
        with encoder_decisions(passed, _decided):
            real(encoder, *args, **kwargs)
    except _Fast:
        return True
    except _Other:
        return False
    finally:
        encoder._modules["layers"] = layers
    return False


def _decided(*_: Any, **__: Any) -> Any:
    raise _Fast

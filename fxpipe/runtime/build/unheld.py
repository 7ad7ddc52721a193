"""What stands in a stage where its modules reach a tensor of the model that the stage does not hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxpipe._torch import FakeTensor
from fxpipe.errors import MaterializeError


class Unheld(torch.Tensor):
    """Stands for a tensor of another stage: may be asked for its shape, and raises where anything computes with it.

    Modules may keep references to others (``self.parent = [parent]``) that they never read a weight through.
    """

    fqn: str

    @classmethod
    def of(cls, fqn: str, tensor: torch.Tensor) -> Unheld:
        """Give what stands for a tensor of the model.

        Args:
            fqn: Its name.
            tensor: The model's, real or fake.
        """
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        unheld = empty.as_subclass(cls)
        unheld.fqn = fqn
        return unheld

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what is asked of the tensor's form.

        Raises:
            MaterializeError: Anything else.
        """
        if getattr(func, "__name__", "") == "__get__":
            answer = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
            if not isinstance(answer, torch.Tensor):
                return answer
        names = [value.fqn for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)]
        raise MaterializeError(
            f"a stage reads {', '.join(names) or 'a tensor of another stage'}, which it does not hold: the model "
            "reaches it in a way that capture did not see\n  pass the tensor as an argument, or register it in the "
            "module that reads it"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Unheld:
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Unheld({self.fqn})"


def check_values(tensors: Iterable[Any], what: str) -> None:
    """Refuse tensors without values.

    Raises:
        MaterializeError: One is fake or on meta.
    """
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and (isinstance(tensor, FakeTensor) or tensor.is_meta):
            raise MaterializeError(
                f"{what} computed with a tensor {list(tensor.shape)} that has no values\n"
                "  a module keeps a tensor without memory: make it a buffer, or make it on a real device"
            )


def lie_in_own(stage: nn.Module, results: Sequence[torch.Tensor]) -> frozenset[int]:
    """Tell which results of a stage lie in the memory of one of its parameters or buffers.

    They have to be copied: what is on its way to the next stage while a sharded weight is let go of, or while the next
    microbatch writes into a buffer, would arrive as something else.

    >>> layer = nn.Linear(3, 2)
    >>> sorted(lie_in_own(layer, [layer.weight.T, layer.weight + 1, layer.bias[:1]]))
    [0, 2]
    """
    own = (each for each in (*stage.parameters(), *stage.buffers()) if type(each) in _PLAIN)
    memory = {each.untyped_storage().data_ptr() for each in own} - {0}
    return frozenset(index for index, each in enumerate(results) if each.untyped_storage().data_ptr() in memory)


_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)  # of others' memory, such as a distributed tensor's, nothing is sent

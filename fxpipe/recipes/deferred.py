"""Build a model without memory, and have the values of any of its tensors afterwards."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from fxpipe._torch import FakeTensor, checked_generators, truncated_normals
from fxpipe.errors import MaterializeError
from fxpipe.recipes.lazy import recorded_lazily
from fxpipe.recipes.operations import is_there
from fxpipe.recipes.recorder import InitRecorder, RecordingMode
from fxpipe.recipes.replay import BLANK, OTHER_BLANK, Replay, holds_blanks, replaying, view_of
from fxpipe.recipes.tape import Entry, Operation, Region

_active: list[RecordingMode] = []
_FARTHEST = 9.0
"""Normal samples lie nearer than so many standard deviations: they are made of uniform ones of at most 53 bits."""


@contextlib.contextmanager
def deferred_init(seed: int | None = 0) -> Iterator[None]:
    """Record how tensors are initialised instead of initialising them.

    What is built inside has its shapes, dtypes and ties, but no memory, and remembers how each of its tensors would
    have been filled. ``fxpipe.compile`` takes it like any other model; ``materialize`` then fills the tensors of its
    own stages and no others, with exactly the bits of a plain build::

        torch.manual_seed(seed)
        model = build()

    Random numbers that are nobody's are skipped, not drawn. Torch's generators stand afterwards where that build
    leaves them. Values that Python asks for inside (``.item()``, ``if (w > 0).any()``, ``.numpy()``) are computed.
    ``torch.device("meta")`` inside stands for the CPU.

    What comes from outside of torch is taken when it is read: numbers drawn from ``random`` or ``numpy`` become part
    of the recording as they are, and are kept in memory. ``seed`` does not seed those generators, as
    ``torch.manual_seed`` does not: seed them alike on every rank, before the block.

    Args:
        seed: What ``torch.manual_seed`` would be given before a plain build; None leaves the generators as they are.

    Raises:
        MaterializeError: Something is done inside that cannot be recorded: memory is written that was made outside
            without memory, or a device is used that is not there.

    Inside of another block it only seeds. After Torch's ``deferred_init`` in torchdistx, with the random stream cut.

    >>> import torch
    >>> with deferred_init(seed=0):
    ...     layer = torch.nn.Linear(10**5, 10**5)
    >>> layer.weight.shape
    torch.Size([100000, 100000])
    """
    if seed is not None:
        torch.manual_seed(seed)
    if _active:
        yield
        return
    mode = RecordingMode()
    with contextlib.ExitStack() as stack:
        stack.enter_context(checked_generators(_refuse_generator))
        stack.enter_context(truncated_normals(_truncated(mode)))
        stack.enter_context(recorded_lazily())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_Questions(mode))
        stack.callback(mode.recorder.finish)
        stack.enter_context(mode)
        _active.append(mode)
        stack.callback(_active.pop)
        yield


@dataclass(frozen=True, slots=True, eq=False)
class _Given:
    """What stands in a recording for values that are asked for later."""

    name: str
    dtype: torch.dtype
    value: Callable[[str], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.value(self.name).to(self.dtype)


def given(name: str, like: torch.Tensor, value: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Make, inside of ``deferred_init``, a tensor whose values are asked for whenever they are needed.

    Args:
        name: What it is.
        like: A tensor of its shape, strides and dtype.
        value: Gives, by the name, its values on the CPU, in memory of their own; they are cast to its dtype.

    >>> with deferred_init():
    ...     weight = given("weight", torch.empty(2), lambda name: torch.ones(2))
    ...     doubled = weight * 2
    >>> given_names(doubled), dict(replay({"doubled": doubled}))
    (('weight',), {'doubled': tensor([2., 2.])})
    """
    recorder = _active[-1].recorder
    strides = torch.empty_like(like, device="meta").stride() if like.numel() else like.stride()
    twin = torch.empty_strided(like.shape, strides, dtype=like.dtype, device="cpu")
    region = recorder.region(twin)
    storages = frozenset((region.storage,))
    recorder.tape.append(
        Operation(
            _Given(name, like.dtype, value),
            (),
            {},
            ((0, region),),
            frozenset(),
            storages,
            storages,
            None,
            twin.device,
            torch.get_default_dtype(),
        )
    )
    return twin


def given_names(tensor: torch.Tensor) -> tuple[str, ...]:
    """Give the names of the given tensors that a recorded one is made of."""
    recorder: InitRecorder = tensor.fake_mode.recorder  # type: ignore[attr-defined]
    functions = (getattr(entry, "function", None) for entry in _needed(recorder, tensor))
    return tuple(dict.fromkeys(each.name for each in functions if isinstance(each, _Given)))


def is_as_given(tensor: torch.Tensor) -> bool:
    """Tell whether a recorded tensor is a given one, whole, to which nothing was done."""
    recorder: InitRecorder = tensor.fake_mode.recorder  # type: ignore[attr-defined]
    entries = _needed(recorder, tensor)
    if len(entries) != 1 or not isinstance(entries[0], Operation) or not isinstance(entries[0].function, _Given):
        return False
    return entries[0].outputs[0][1] == recorder.region(tensor)


def _needed(recorder: InitRecorder, tensor: torch.Tensor) -> list[Entry]:
    return [recorder.tape.entries[place] for place in recorder.tape.needed(recorder.number(tensor))[0]]


def is_recording() -> bool:
    """Tell whether the caller is inside of ``deferred_init``."""
    return bool(_active)


def is_recorded(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor was made inside of ``deferred_init``."""
    return isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, RecordingMode)


def replay(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Give recorded tensors their values, one after another.

    Args:
        tensors: Recorded tensors, by any name.

    Yields:
        A name and its values, on the device the constructor made them on; None where nothing ever filled all of it.
        Each is computed when it is asked for, in the order that is cheapest, and belongs to the caller; tensors that
        lay in one storage still do.

    >>> with deferred_init(seed=0):
    ...     layer = torch.nn.Linear(2, 3)
    >>> values = dict(replay({"bias": layer.bias}))
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(values["bias"], torch.nn.Linear(2, 3).bias)
    True
    """
    by_mode: dict[int, tuple[Any, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        assert is_recorded(tensor), f"{name} was not recorded"
        by_mode.setdefault(id(tensor.fake_mode), (tensor.fake_mode, {}))[1][name] = tensor  # type: ignore[attr-defined]
    for mode, own in by_mode.values():
        yield from _replay(mode.recorder, own)


def _replay(recorder: InitRecorder, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor | None]]:
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(recorder.number(tensor), []).append(name)
    needs, are_open = {}, set()
    for number in names:
        needs[number], is_open = recorder.tape.needed(number)
        if is_open:
            are_open.add(number)
    replay = Replay(recorder.tape, recorder.streams, recorder.size, BLANK)
    filling = replay.storages(needs)
    while True:
        with replay.running():
            number, storage = next(filling, (-1, None))
        if storage is None:
            return
        for name in names[number]:
            with replaying():
                region = recorder.region(tensors[name])
                value: torch.Tensor | None = view_of(storage, region)
                if number in are_open and holds_blanks(view_of(storage, region)):
                    value = _if_filled(recorder, number, region, needs[number], view_of(storage, region))
            yield name, value
        del storage, value


def _if_filled(
    recorder: InitRecorder, number: int, region: Region, needs: list[int], value: torch.Tensor
) -> torch.Tensor | None:
    """Fill memory of other contents again: what differs was never filled."""
    again = Replay(recorder.tape, recorder.streams, recorder.size, OTHER_BLANK)
    with again.running():
        other = dict(again.storages({number: needs}))[number]
    return value if _same_bytes(value, view_of(other, region)) else None


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


class _Questions(TorchFunctionMode):
    """Answers what Python asks of tensors in ways that no operation shows."""

    def __init__(self, mode: RecordingMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = _ANSWERS.get(func)
        if answer is None or not is_recorded(args[0]):
            return func(*args, **(kwargs or {}))
        return answer(self._mode, func, args, kwargs or {})


def _value(mode: RecordingMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = mode.values(args[0])
    if func is torch.Tensor.tolist:
        return value.tolist()
    result = func(value.requires_grad_(args[0].requires_grad), *args[1:], **kwargs)
    if not kwargs.get("force"):
        result.flags.writeable = False  # writes would be lost
    return result


def _address(mode: RecordingMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise MaterializeError(
        f"Tensor.{func.__name__} is asked for in deferred_init, where tensors have no memory\n"
        "  fill tensors by torch operations, or build this model without deferred_init"
    )


def _set_data(mode: RecordingMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0], args[1] if isinstance(args[1], FakeTensor) else mode.lift(args[1]))


def _deepcopy(mode: RecordingMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with warnings.catch_warnings():  # that it asks for the memory it does not have
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        return func(*args, **kwargs)


_ANSWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist), _value),
    **dict.fromkeys((torch.Tensor.data_ptr, torch.Tensor.share_memory_, torch.Tensor.__dlpack__), _address),
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    torch.Tensor.__deepcopy__: _deepcopy,
}


def _truncated(mode: RecordingMode) -> Callable[..., Any]:
    """Give what stands for torch's ``trunc_normal_``, which draws until every sample lies between its bounds."""

    def record(real: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not is_recorded(tensor):
            return cast(torch.Tensor, real(tensor, *args, **kwargs))
        mean, std, low, high, generator = _bounds(*args, **kwargs)
        if std > 0 and min(high - mean, mean - low) > _FARTHEST * std and _draws_once(real):
            with torch.no_grad():
                return tensor.normal_(mean, std, generator=generator)
        return mode.call(real, tensor, mean, std, low, high, generator=generator)

    return record


def _bounds(
    mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
) -> tuple[float, float, float, float, torch.Generator | None]:
    return mean, std, a, b, generator


@functools.cache
def _draws_once(real: Callable[..., Any]) -> bool:
    """Tell whether far bounds leave only a ``normal_``; some versions of torch draw by the inverse distribution."""
    with replaying():
        for dtype in (torch.float32, torch.bfloat16):
            one, other = (torch.empty(1000, dtype=dtype, device="cpu") for _ in range(2))
            generators = [torch.Generator("cpu").manual_seed(5) for _ in range(2)]
            real(one, 0.5, 0.25, -9.0, 9.0, generator=generators[0])
            other.normal_(0.5, 0.25, generator=generators[1])
            if not (torch.equal(one, other) and torch.equal(generators[0].get_state(), generators[1].get_state())):
                return False
    return True


def _refuse_generator(device: torch.device) -> None:
    if not is_there(device):
        raise MaterializeError(
            f"a random generator of {device} is made in deferred_init, and there is no such device here\n"
            "  use one of the CPU, whose numbers are the same everywhere, or build where the device is"
        )

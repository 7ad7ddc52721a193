"""Write down every operation on tensors without memory, and answer what Python asks of their values."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpipe._torch import (
    FAKE_CANNOT,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    device_asked,
    forget_conversions,
    negative_view,
    storage_key,
    without_functions,
    without_modes,
)
from fxpipe.errors import MaterializeError
from fxpipe.recipes.draws import count_draws
from fxpipe.recipes.operations import (
    EMPTY,
    FILLS,
    FLOATS,
    PLAIN_FILLS,
    READS,
    About,
    about_operation,
    generator_of,
    is_there,
    spelled,
)
from fxpipe.recipes.replay import Replay, replaying, view_of
from fxpipe.recipes.streams import GeneratorStream, MetaStream, Position, Streams, default_generator
from fxpipe.recipes.tape import Constant, Operation, Region, Tape, leaves, map_tensors

aten = torch.ops.aten
_CPU = torch.device("cpu")
_NOTHING: frozenset[int] = frozenset()
_NO_ARGUMENTS: Mapping[str, Any] = {}


class RecordingMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Gives tensors without memory, and records what is done to them, for as long as they live.

    Entered, it records whatever a constructor does. Its tensors lead back to it, so that what is done to them
    afterwards is recorded as well.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.recorder = InitRecorder(self)
        self._busy = False

    def dispatch(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Do one operation; what a fake does by itself to find out the shape of a result is not recorded."""
        device = device_asked(func, args)
        if device is not None:
            return device
        call = super().dispatch
        if self._busy:
            return call(func, types, args, kwargs or {})
        self._busy = True
        try:
            return self.recorder.handle(functools.partial(call, func, types), func, tuple(args), dict(kwargs or {}))
        finally:
            self._busy = False
            forget_conversions(self)  # they are weak references, which keep modules from changing their dtype

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordingMode:
        return self  # copies of a parameter are made with what is noted on it, this mode included

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a twin without memory of a tensor from outside, which has its value."""
        with self._quiet():
            return self.recorder.lift(tensor)

    def call(self, function: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Record a function that fills a tensor with random numbers, however many it takes."""
        with self._quiet(), without_modes(), without_functions():
            return self.recorder.call(function, tensor, *args, **kwargs)

    def values(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give the values that a tensor has now."""
        with self._quiet(), without_modes(), without_functions():
            return self.recorder.values([tensor])[0]

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before


@dataclass(slots=True, eq=False)
class InitRecorder:
    """One recording.

    Attributes:
        mode: The mode its tensors belong to.
        tape: What was done.
        streams: Where generators stand.
    """

    mode: Any
    tape: Tape = field(default_factory=Tape)
    streams: Streams = field(default_factory=Streams)
    _storages: list[torch.UntypedStorage] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _lifted: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _on_meta: set[int] = field(default_factory=set)
    _meta: MetaStream = field(init=False)

    def __post_init__(self) -> None:
        self._meta = MetaStream(self.streams)

    # --- storages -------------------------------------------------------------------------------------------------

    def number(self, tensor: torch.Tensor, make: bool = True) -> int:
        """Give the number of a tensor's storage; -1 if it has none and none is to be made."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage_key(tensor), -1)
        if number < 0 and make:
            number = self._numbers[storage_key(tensor)] = len(self._storages)
            self._storages.append(storage)  # alive, so that its key stays its own
        return number

    def size(self, number: int) -> int:
        """Give the bytes of a storage."""
        return int(self._storages[number].nbytes())

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor belongs to this recording."""
        return isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode

    def region(self, tensor: torch.Tensor) -> Region:
        """Give where a tensor lies."""
        return Region(
            self.number(tensor),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.is_conj(),
            tensor.is_neg(),
        )

    # --- operations -----------------------------------------------------------------------------------------------

    def handle(self, call: Callable[..., Any], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do one operation without memory, and write it down.

        Args:
            call: Does it on fake tensors.
            func: The operation.
            args: Its arguments, fake and real.
            kwargs: Its keyword arguments.
        """
        if not isinstance(func, OpOverload):
            raise MaterializeError(
                f"{func} runs inside of deferred_init, which does not know what it changes\n"
                "  build this model without deferred_init"
            )
        about = about_operation(func)
        if about.is_view and self.is_own(args[0]):
            return call(args, kwargs)
        if func in PLAIN_FILLS and self._is_plain(args, kwargs):
            self._write_fill(func, about, args, kwargs)
            return args[0]  # there is nothing that a fake could add: its shape stays
        is_meta = self.streams.marking and self._to_cpu(func, kwargs)
        given = leaves((args, kwargs))
        is_fake = [self.is_own(tensor) for tensor in given]
        if func is aten.lift_fresh.default and not is_fake[0]:
            return self.lift(args[0])
        if (given and not any(is_fake)) or func in READS:
            return self.really(func, args, kwargs)
        if not all(is_fake):
            if any(not self.is_own(tensor) for tensor in self._written(about, args, kwargs)):
                return self.really(func, args, kwargs)
            args, kwargs = map_tensors((args, kwargs), self.lift)
            given = leaves((args, kwargs))
        known = {self.number(tensor) for tensor in given}
        try:
            result = call(args, kwargs)
        except FAKE_CANNOT:  # the shape depends on values, or there is no rule for it
            return self.really(func, args, kwargs)
        if about.changes_shape_only:
            return result
        written = {self.number(tensor) for tensor in self._written(about, args, kwargs)}
        found = leaves(result)
        fresh = [(place, t) for place, t in enumerate(found) if self.number(t, make=False) not in known | written]
        outputs = tuple((place, self.region(tensor)) for place, tensor in fresh)
        made = {region.storage for _, region in outputs}
        if is_meta or not self._on_meta.isdisjoint(known | written):  # to_empty(device="cpu") leaves meta
            stays = is_meta or kwargs.get("device") is None
            self._on_meta.update(made | written if stays else written)
        if func in EMPTY or not (written or made):
            return result
        self._write_down(func, args, kwargs, about, found, outputs, known, written)
        return result

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Tell whether a fill cannot fail: a floating-point tensor of this recording, and numbers in range."""
        tensor, numbers = args[0], args[1:]
        return (
            self.is_own(tensor)
            and tensor.dtype in FLOATS
            and 0 not in tensor.stride()
            and kwargs.keys() <= {"generator"}
            and all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers[1:])
            and (len(numbers) < 2 or numbers[0] <= numbers[1] or numbers[0] <= 0)
        )

    def call(self, function: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Write down a whole function that fills a tensor with random numbers, however many it takes.

        Args:
            function: Called as ``function(tensor, *args, **kwargs)``; a ``generator`` may be among the last.
            tensor: What it fills.
        """
        storage = self.number(tensor)
        self._write_down(
            function, (tensor, *args), kwargs, About(((0, ""),), False, True, False), [], (), {storage}, {storage}
        )
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def _write_down(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        about: About,
        found: list[torch.Tensor],
        outputs: tuple[tuple[int, Region], ...],
        known: set[int],
        written: set[int],
    ) -> None:
        replaces = {region.storage for _, region in outputs}
        replaces |= self._filled(func, about, args, kwargs)
        device, stream, position = _CPU, None, None
        if about.is_random:
            device = (found or leaves(args))[0].device
            stream = self._stream(generator_of(args, kwargs), device, written | replaces)
            position = stream.locate()
        args, kwargs = map_tensors((args, kwargs), self.region)
        entry = Operation(
            func,
            map_tensors(args, _nothing, torch.Generator),
            map_tensors(kwargs, _nothing, torch.Generator),
            outputs,
            frozenset(known - replaces),
            frozenset(written | replaces),
            frozenset(replaces),
            position,
            device,
            torch.get_default_dtype(),
        )
        self._append(entry, stream, found[0] if found else None)

    def _write_fill(self, func: Any, about: About, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write down what most of a recording is made of: as ``_write_down``, without looking for tensors."""
        tensor = args[0]
        writes = frozenset((self.number(tensor),))
        is_whole = self._is_whole(tensor)
        stream = self._stream(kwargs.get("generator"), tensor.device, writes) if about.is_random else None
        entry = Operation(
            func,
            (self.region(tensor), *args[1:]),
            _NO_ARGUMENTS,
            (),
            _NOTHING if is_whole else writes,
            writes,
            writes if is_whole else _NOTHING,
            stream.locate() if stream is not None else None,
            tensor.device,
            torch.get_default_dtype(),
        )
        self._append(entry, stream, tensor)

    def _append(
        self, entry: Operation, stream: GeneratorStream | MetaStream | None, filled: torch.Tensor | None
    ) -> None:
        """Write down an operation, and move the stream it draws from."""
        self.tape.append(entry)
        if stream is not None and entry.position is not None:
            at = entry.position
            draws = None
            if filled is not None:
                draws = count_draws(entry.function, filled, lambda: self.streams.has_cached_normal(at))
            stream.move(self._found_out(entry) if draws is None else Position(at.base, at.draws + draws))

    def _stream(
        self, named: torch.Generator | None, device: torch.device, written: Set[int]
    ) -> GeneratorStream | MetaStream:
        """Give the stream that an operation draws from."""
        if named is None and self.streams.marking and not self._on_meta.isdisjoint(written):
            return self._meta
        return GeneratorStream(self.streams, named or default_generator(device))

    def _written(self, about: About, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        values = [args[place] if place < len(args) else kwargs.get(name) for place, name in about.written]
        return leaves(values)

    def _filled(self, func: Any, about: About, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
        """Give the storages of which an operation writes every byte and reads none."""
        if not (func in FILLS or about.is_out):
            return set()
        written = self._written(about, args, kwargs)
        filled = {self.number(tensor) for tensor in written if self._is_whole(tensor)}
        if not filled:
            return filled
        others = [t for t in leaves((args, kwargs)) if all(t is not target for target in written)]
        return filled - {self.number(tensor) for tensor in others}

    def _is_whole(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor covers its storage."""
        if tensor.numel() * tensor.element_size() != self.size(self.number(tensor)):
            return False
        if tensor.is_contiguous():
            return True
        expected = 1
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def _to_cpu(self, func: Any, kwargs: dict[str, Any]) -> bool:
        """Let what asks for meta get the CPU; tell whether it did. Refuse devices that are not there."""
        asked = kwargs.get("device")
        if asked is None:
            return False
        device = torch.device(asked)
        if device.type == "meta":
            kwargs["device"] = _CPU
            return True
        if not is_there(device):
            raise MaterializeError(
                f"{spelled(func)} asks for {device}, and there is no such device here\n"
                "  build the model on the CPU: materialize moves each rank's tensors to its device"
            )
        return False

    # --- values ---------------------------------------------------------------------------------------------------

    def lift(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a twin without memory of a tensor from outside; what it holds now is its value."""
        if self.is_own(tensor):
            return tensor
        if isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, RecordingMode):
            tensor = tensor.fake_mode.values(tensor)
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise MaterializeError(
                f"a tensor {tuple(tensor.shape)} without memory, made outside of deferred_init, is used inside: "
                "nothing says what its values are\n  make it inside of the block, or give it memory"
            )
        if tensor.layout != torch.strided:
            raise MaterializeError(
                f"a {str(tensor.layout).removeprefix('torch.')} tensor is used with others in deferred_init, which "
                "records strided tensors only\n  build this model without deferred_init"
            )
        storage = tensor.untyped_storage()
        whole = Region(0, torch.uint8, (storage.nbytes(),), (1,), 0)
        copy, flat = self._lifted.get(storage_key(tensor), (None, None))
        with replaying():
            now = view_of(storage, whole)
            # Storages are told apart by what they hold: one may be written past torch, or another be in its place.
            if copy is None or copy.device != now.device or not torch.equal(copy, now):
                copy, flat = now.clone(), None
        with self.mode, without_functions():
            if flat is None:
                flat = torch.empty(storage.nbytes(), dtype=torch.uint8, device=copy.device)
                self._lifted[storage_key(tensor)] = copy, flat
                self.tape.append(Constant(self.number(flat), copy))
            size = tensor.element_size()
            elements = flat[: len(flat) // size * size].view(tensor.dtype)
            twin = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            twin = twin.conj() if tensor.is_conj() else twin
            return negative_view(twin) if tensor.is_neg() else twin

    def values(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give the values that tensors have now; tensors that share memory share it in the result."""
        numbers = dict.fromkeys(self.number(tensor) for tensor in tensors)
        replay = Replay(self.tape, self.streams, self.size, blank=0)
        with replay.running():
            held = dict(replay.storages({number: self.tape.needed(number)[0] for number in numbers}))
            return [view_of(held[self.number(tensor)], self.region(tensor)) for tensor in tensors]

    def really(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation on values, and keep what it gives: numbers for Python, or tensors as constants."""
        fakes = list({id(t): t for t in leaves((args, kwargs)) if self.is_own(t)}.values())
        twins = dict(zip(map(id, fakes), self.values(fakes), strict=True)) if fakes else {}
        about = about_operation(func)
        given = leaves((args, kwargs))
        generator, position = None, None
        if about.is_random:
            generator = generator_of(args, kwargs) or default_generator(given[0].device)
            position = self.streams.locate(generator)
        with without_modes(), without_functions():
            if generator is not None and position is not None:
                generator.set_state(self.streams.state(position))
            real_args, real_kwargs = map_tensors((args, kwargs), lambda tensor: twins.get(id(tensor), tensor))
            result = func(*real_args, **real_kwargs)
            if generator is not None:
                self.streams.move(generator, self.streams.add(generator.get_state()))
        for tensor in self._written(about, args, kwargs):
            if id(tensor) in twins:
                with replaying():
                    whole = Region(0, torch.uint8, (self.size(self.number(tensor)),), (1,), 0)
                    now = view_of(twins[id(tensor)].untyped_storage(), whole).clone()
                self.tape.append(Constant(self.number(tensor), now))
        if not fakes:
            return result
        back = {id(twin): fake for fake, twin in zip(fakes, (twins[id(fake)] for fake in fakes), strict=True)}
        return map_tensors(result, lambda tensor: back[id(tensor)] if id(tensor) in back else self._kept(tensor))

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.lift(tensor) if tensor.layout == torch.strided else tensor

    def _found_out(self, entry: Operation) -> Position:
        """Run what was just recorded, to see where it leaves its generator."""
        places = sorted({place for storage in entry.writes for place in self.tape.needed(storage)[0]})
        replay = Replay(self.tape, self.streams, self.size, blank=0)
        with replay.running():
            for place in places:
                replay.run(self.tape.entries[place])
            return self.streams.add(default_generator(entry.device).get_state())

    # --- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Let the generators stand where a plain build leaves them; go on recording what is done to the tensors."""
        self._meta.finish()
        self.streams.settle()
        self._lifted.clear()


def _nothing(generator_of: Any) -> None:
    return None

"""Do again what was recorded, for real, for the tensors that are wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fxpipe._torch import negative_view, without_functions, without_modes
from fxpipe.recipes.draws import count_draws
from fxpipe.recipes.streams import Position, Streams, default_generator, kept
from fxpipe.recipes.tape import Constant, Operation, Region, Tape, components, last_uses, leaves, map_tensors

_STEP_BELOW = 4_000_000
"""Up to so many draws, drawing them is cheaper than a jump."""
BLANK, OTHER_BLANK = 0xFF, 0x5A
"""What memory is full of that nothing has filled: not a number in every usual float type; and another byte."""


@dataclass(slots=True, eq=False)
class Replay:
    """Memory of tensors that are being filled again.

    Attributes:
        tape: What was recorded.
        streams: Where the generators stood.
        sizes: Bytes of each storage.
        blank: What memory is full of at first, where it may be read before it is filled; None: of anything.
        memory: The storages that are alive.
        reached: For each device, where its generator stands.
        states: For each device, the state of its generator between runs.
    """

    tape: Tape
    streams: Streams
    sizes: Callable[[int], int]
    blank: int | None = None
    memory: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    reached: dict[torch.device, Position | None] = field(default_factory=dict)
    states: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run for real, with generators of its own: those of the process are put back."""
        entries = self.tape.entries
        drawn = (entry.device for entry in entries if isinstance(entry, Operation) and entry.position is not None)
        generators = {device: default_generator(device) for device in dict.fromkeys(drawn)}
        with contextlib.ExitStack() as stack:
            stack.enter_context(replaying())
            for device, generator in generators.items():
                stack.enter_context(kept(generator))
                if device in self.states:
                    generator.set_state(self.states[device])
            yield
            self.states = {device: generator.get_state() for device, generator in generators.items()}

    def storages(self, wanted: Mapping[int, list[int]]) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Fill storages, and yield each as soon as nothing more is done to it; then it is the caller's alone.

        Args:
            wanted: The storages, and the places of the entries that each needs.
        """
        for members, places in components(wanted):
            entries = [(place, self.tape.entries[place]) for place in places]
            last = last_uses(entries)
            for storage in members:
                if storage not in last:
                    yield storage, self._take(storage)
            done: dict[int, list[int]] = {}
            for storage, place in last.items():
                done.setdefault(place, []).append(storage)
            for place, entry in entries:
                self.run(entry)
                for storage in done.get(place, ()):
                    if storage in members:  # another one that is wanted may have been read here as it was before
                        yield storage, self._take(storage)
                    self.memory.pop(storage, None)

    def run(self, entry: Operation | Constant) -> None:
        """Do one thing again."""
        if isinstance(entry, Constant):
            self.memory[entry.storage] = entry.value.clone().untyped_storage()
            return
        made = {region.storage for _, region in entry.outputs}
        for storage in entry.replaces - made - self.memory.keys():
            self._allocate(storage, None)
        args, kwargs = map_tensors((entry.args, entry.kwargs), self.view, Region)
        if entry.position is not None:
            self._seek(entry.device, entry.position)
        with _default_dtype(entry.default_dtype):
            result = entry.function(*args, **kwargs)
        found = leaves(result)
        if entry.position is not None:
            self.reached[entry.device] = self._after(entry, found)
        for index, region in entry.outputs:
            self.memory[region.storage] = self._as_recorded(found[index], region)

    def view(self, region: Region) -> torch.Tensor:
        """Give the tensor that lies in a region; its memory is there from now on."""
        if region.storage not in self.memory:
            self._allocate(region.storage, self.blank)
        return view_of(self.memory[region.storage], region)

    def _allocate(self, storage: int, blank: int | None) -> None:
        flat = torch.empty(self.sizes(storage), dtype=torch.uint8, device="cpu")
        if blank is not None:
            flat.fill_(blank)
        self.memory[storage] = flat.untyped_storage()

    def _take(self, storage: int) -> torch.UntypedStorage:
        if storage not in self.memory:
            self.view(Region(storage, torch.uint8, (self.sizes(storage),), (1,), 0))
        return self.memory.pop(storage)

    def _as_recorded(self, tensor: torch.Tensor, region: Region) -> torch.UntypedStorage:
        """Give memory laid out as it was recorded, should the kernel lay it out otherwise than its fake."""
        layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        size = self.sizes(region.storage)
        if layout == (region.shape, region.stride, region.offset) and tensor.untyped_storage().nbytes() >= size:
            return tensor.untyped_storage()
        flat = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        view_of(flat.untyped_storage(), region).copy_(tensor)
        return flat.untyped_storage()

    def _seek(self, device: torch.device, position: Position) -> None:
        generator, reached = default_generator(device), self.reached.get(device)
        if reached is not None and reached.base == position.base:
            ahead = position.draws - reached.draws
            if 0 <= ahead <= _STEP_BELOW:
                _step(generator, ahead)
                return
        generator.set_state(self.streams.state(position))

    def _after(self, entry: Operation, found: list[torch.Tensor]) -> Position | None:
        assert entry.position is not None
        at = entry.position
        draws = count_draws(entry.function, found[0], lambda: self.streams.has_cached_normal(at)) if found else None
        return None if draws is None else Position(at.base, at.draws + draws)


@contextlib.contextmanager
def replaying() -> Iterator[None]:
    """Run torch for real, whatever modes are active."""
    with without_modes(), without_functions(), torch.no_grad():
        yield


def view_of(storage: torch.UntypedStorage, region: Region) -> torch.Tensor:
    """Look at memory as a tensor."""
    tensor = torch.empty(0, dtype=region.dtype, device=storage.device)
    tensor.set_(storage, region.offset, region.shape, region.stride)
    tensor = tensor.conj() if region.conjugate else tensor
    return negative_view(tensor) if region.negative else tensor


def _step(generator: torch.Generator, draws: int) -> None:
    buffer = torch.empty(min(draws, 1 << 16), dtype=torch.float32, device="cpu")  # a word each, whatever the default
    while draws:
        buffer = buffer[:draws]
        buffer.uniform_(generator=generator)
        draws -= len(buffer)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    if before == dtype:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def holds_blanks(tensor: torch.Tensor) -> bool:
    """Tell whether an element may never have been filled; False is certain."""
    if not tensor.numel():
        return False
    if tensor.dtype.is_complex or (tensor.is_floating_point() and tensor.element_size() > 1):
        return bool(tensor.sum().isnan())
    elements = tensor.contiguous().view(-1).view(torch.uint8).view(tensor.numel(), -1)
    return bool((elements == BLANK).all(dim=1).any())

"""Where the random generators stand while a constructor is recorded.

Nothing is drawn then: each generator has a position, the state it started from and the number of words drawn since. The
generators themselves must show the model's own code where they stand, because it reads, saves, restores and reseeds
them. So a generator that has moved holds a mark instead of the true state: a state whose words name a position. Code
that saves and restores it restores the position; any other state that appears was set by code that reseeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fxpipe.recipes.mersenne import STATE_BYTES, advance, has_cached_normal, rewind_words, words_of

_MARK = (0x66787069, 0x70650000)
_serials = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Position:
    """A place in a stream of random words.

    Attributes:
        base: Index of the state the stream starts from.
        draws: Words drawn since.
    """

    base: int
    draws: int = 0


@dataclass(slots=True, eq=False)
class Streams:
    """The positions of all generators.

    Attributes:
        bases: States that streams start from.
        known: Which of them is which, by a digest of the state.
        marking: Whether generators hold marks; else they hold their true states.
        serial: Tells the marks of one recording from those of another.
        positions: What each mark means.
        generators: Those that hold a mark, by ``id``.
        is_drawn: Whether anything drew from the default generator.
        marks: The mark that was made last, by the index of its base.
    """

    bases: list[torch.Tensor] = field(default_factory=list)
    known: dict[bytes, int] = field(default_factory=dict)
    marking: bool = True
    serial: int = field(default_factory=lambda: next(_serials))
    positions: list[Position] = field(default_factory=list)
    generators: dict[int, torch.Generator] = field(default_factory=dict)
    is_drawn: bool = False
    marks: dict[int, torch.Tensor] = field(default_factory=dict)

    def locate(self, generator: torch.Generator) -> Position:
        """Find where a generator stands, also after it was reseeded."""
        state = generator.get_state()
        if generator.device.type == "cpu" and self.marking:
            words = words_of(state)
            if int(words[0]) == _MARK[0] and int(words[1]) == _MARK[1] ^ self.serial:
                return self.positions[int(words[2])]
        return self.add(state)

    def add(self, state: torch.Tensor) -> Position:
        """Begin a stream, or find it."""
        key = hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
        if key not in self.known:
            self.known[key] = len(self.bases)
            self.bases.append(state)
        return Position(self.known[key])

    def move(self, generator: torch.Generator, position: Position) -> None:
        """Say that a generator stands somewhere else now."""
        if not self.marking or generator.device.type != "cpu":
            generator.set_state(self.state(position))
            return
        mark = self.marks.get(position.base)
        if mark is None:
            mark = self.bases[position.base].clone()  # code that asks for the seed gets the right one
            rewind_words(mark)
            words_of(mark)[:2] = _MARK[0], _MARK[1] ^ self.serial
            self.marks = {position.base: mark}
        words_of(mark)[2] = len(self.positions)
        self.positions.append(position)
        self.generators[id(generator)] = generator
        generator.set_state(mark)

    def state(self, position: Position) -> torch.Tensor:
        """Give the true state at a position."""
        base = self.bases[position.base]
        return advance(base, position.draws) if base.numel() == STATE_BYTES else base

    def has_cached_normal(self, position: Position) -> bool:
        """Tell whether a generator keeps a normal sample there."""
        return has_cached_normal(self.bases[position.base])

    def settle(self) -> None:
        """Let every generator stand where it would stand had everything been drawn; no marks from now on."""
        for generator in self.generators.values():
            generator.set_state(self.state(self.locate(generator)))
        self.generators.clear()
        self.marking = False


@dataclass(slots=True, eq=False)
class GeneratorStream:
    """Where a generator stands.

    Attributes:
        streams: All positions.
        generator: The generator.
    """

    streams: Streams
    generator: torch.Generator

    def locate(self) -> Position:
        """Find where it stands."""
        return self.streams.locate(self.generator)

    def move(self, position: Position) -> None:
        """Say that it stands somewhere else now."""
        if self.generator is torch.default_generator:
            self.streams.is_drawn = True
        self.streams.move(self.generator, position)


@dataclass(slots=True, eq=False)
class MetaStream:
    """What tensors that a constructor puts on meta draw from.

    In a plain build they draw nothing: a layer that is only built on meta to find out shapes must not move the
    generator. But a model that is built on meta as a whole is to get the numbers it would get on the CPU. So these
    tensors have a stream of their own, which begins where the default generator stands and is that generator's if
    nothing else draws from it. If something does, they get other numbers, lest two layers start alike.

    Attributes:
        streams: All positions.
        anchor: Where the default generator stood when the stream began.
        position: Where the stream stands.
        bases: Where its parts begin.
    """

    streams: Streams
    anchor: Position | None = None
    position: Position = Position(0)
    bases: list[int] = field(default_factory=list)

    def locate(self) -> Position:
        """Find where it stands; it begins anew where the default generator was reseeded."""
        now = self.streams.locate(torch.default_generator)
        if now != self.anchor:
            self.anchor = now
            self.streams.bases.append(self.streams.state(now))
            self.position = Position(len(self.streams.bases) - 1)
            self.bases.append(self.position.base)
        return self.position

    def move(self, position: Position) -> None:
        """Say that it stands somewhere else now."""
        self.position = position

    def finish(self) -> None:
        """Settle whose numbers they are."""
        if self.anchor is None:
            return
        if not self.streams.is_drawn:
            self.streams.move(torch.default_generator, self.position)
            return
        for index, base in enumerate(self.bases):
            seed = int(words_of(self.streams.bases[base])[:4].sum()) + 0x9E3779B9 * (index + 1)
            other = torch.Generator("cpu").manual_seed(seed & 0xFFFFFFFF)
            self.streams.bases[base] = other.get_state()


@contextlib.contextmanager
def kept(generator: torch.Generator) -> Iterator[None]:
    """Leave a generator as it was."""
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)


def default_generator(device: torch.device) -> torch.Generator:
    """Give the generator that a device draws from where none is named."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = device.index if device.index is not None else module.current_device()
    found: torch.Generator = module.default_generators[index]
    return found

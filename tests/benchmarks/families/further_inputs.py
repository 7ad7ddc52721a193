"""More batches, for models that took none of ``small_inputs``: arguments and widths that the errors ask for."""

from __future__ import annotations

import functools
import itertools
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tests.benchmarks.families.repairs import statement
from tests.benchmarks.families.small_inputs import LENGTH, PATCHES, Batches, Inputs, Make

WIDTHS = re.compile(  # how torch says which width it expected, or which two do not fit
    r"to have (\d+) channels|and (\d+)x\d+\)|normalized_shape=\[(\d+)\]|"
    r"must match the (?:existing )?size(?: of tensor b)? \((\d+)\)|elements not (\d+)|contain (\d+) elements"
)
FEATURES = re.compile(r"tokens: \d+, features:? (\d+)")
ROUNDS, WIDTHS_LEARNED, WIDEST = 12, 5, 1024


def none_in(error: BaseException, names: Iterable[str]) -> list[str]:
    """Give the names, of those given, that are None where the error was raised and stand in the line that failed."""
    trace, found = error.__traceback__, []
    for frame, line in zip(traceback.walk_tb(trace), traceback.extract_tb(trace), strict=True):
        words, here = re.findall(r"\w+", statement(line)), frame[0].f_locals
        found.append([name for name in names if name in words and name in here and here[name] is None])
    return [name for several in reversed(found) for name in several]


class FurtherInputs(Inputs):
    """What each argument may be, by what was learned from one error after the other."""

    most = 400

    def __init__(self, model: Any, samples: int) -> None:
        super().__init__(model, samples)
        self.always = list(self.required)
        self.features: dict[int, None] = {}  # how many features the images of a batch gave

    def learn(self, error: Exception | None, batch: Mapping[str, torch.Tensor]) -> None:
        if error is None:
            return
        text = str(error)
        for found in WIDTHS.finditer(text):
            width = int(next(filter(None, found.groups())))
            if len(self.learned) < WIDTHS_LEARNED and width not in self.learned and width <= WIDEST:
                self.learned[width] = None
                self.again = True
        for count in FEATURES.findall(text):
            self.features.setdefault(max(int(count) // self.samples, 1))
        missing = []
        if isinstance(error, TypeError | ValueError):
            words = re.findall(r"\w+", text)
            parts = tuple(f"_{word}" for word in words if "_" in word)
            missing = [name for name in self.taken if name in words or name.endswith(parts)]
            if any(name in batch for name in missing):  # which may not be given both
                missing = []
        if "None" in text:
            missing += none_in(error, self.taken)
        missing = [name for name in missing if name not in (*batch, *self.named, "labels") and self.options(name)]
        if missing:
            self.named[missing[0]] = None
            self.again = True

    def batches(self) -> Batches:
        for _ in range(ROUNDS):
            before = len(self.learned), len(self.named), len(self.features)
            self.again = False
            self.required = list(dict.fromkeys([*self.always, *self.named]))
            yield from self.all_batches()
            if before == (len(self.learned), len(self.named), len(self.features)):
                return

    def tokens(self) -> list[Make]:
        """Words of several books as rows of their own first: their number is no number of samples."""
        books = self.sizes.all("num_codebooks")[:1]
        return [*[self.ids(self.samples * n, LENGTH) for n in books], *super().tokens()]

    def marked(self) -> list[Make]:
        marks = self.sizes.all("image_token_id", "image_token_index")[:1]

        def make(count: int) -> torch.Tensor:
            return torch.cat([torch.full((self.samples, count), marks[0]), self.ids(self.samples, LENGTH)()], 1)

        return [functools.partial(make, count) for count in self.features if marks] + super().marked()

    def described_as(self, name: str) -> list[Make]:
        kind, shape = self.described.get(name, ("", ""))
        if not self.learned or "Long" in kind or "Int" in kind or not shape:
            return super().described_as(name)
        number = shape.count(",") + 1
        last = [self.random(*(self.samples, *[LENGTH] * (number - 2), wide)) for wide in self.learned if number > 1]
        return [*last, *super().described_as(name)]

    def options(self, name: str) -> list[Make]:
        b, usual = self.samples, super().options(name)
        wide = list(
            dict.fromkeys([*self.learned, *self.sizes.all("num_mel_bins", "hidden_size", "channels", "codebook_dim")])
        )
        if name.endswith("mask"):
            return [*usual, self.ones(b, LENGTH), lambda: torch.ones((b, LENGTH), dtype=torch.bool)]
        if name.endswith("input_values"):
            return [*[self.random(b, LENGTH, n) for n in wide[:4]], *usual, *self.sounds()]
        if name in ("hidden_states", "latents", "audio_values"):
            turned = [self.random(b, n, t) for n in [1, *wide[:5]] for t in (LENGTH, 7680) if n == 1 or t == LENGTH]
            return [*turned, *usual]
        if name == "task_inputs":
            return [self.random(b, n) for n in wide]
        if usual or name in ("labels", "label_ids", "return_dict"):
            return usual
        if re.search(r"(^|_)(use|output|return|num|cache|session|idx)(_|$)|outputs?$|cache", name):
            return []
        stem = re.escape(name.rstrip("s"))
        near = self.sizes.like(rf"{stem}.*(dim|size|width)|(dim|size)_.*{stem}")
        shapes = [shape for n in [*near, *wide[:2]] for shape in ((b, n), (b, LENGTH, n))]
        times = self.sizes.all("chunk_size")[:1]
        shapes += [(b, t, n) for t in times for n in near]
        return [*[self.random(*shape) for shape in shapes], self.random(b), self.ids(b, least=0, most=2)]

    def joint(self) -> Iterator[dict[str, Make]]:
        yield from super().joint()
        b, edge = self.samples, PATCHES
        patch = self.sizes.first("patch_size", default=16)
        planes = self.sizes.first("num_channels", "in_channels", default=3)
        pixels = self.random(b, planes, edge * patch, edge * patch)
        if "target_sizes" in self.taken:
            yield {"pixel_values": pixels, "target_sizes": lambda: torch.full((b, 2), edge)}
        if "image_grid_thw" in self.taken and "pixel_values" in self.taken:
            merge = self.sizes.first("spatial_merge_size", default=2)
            wide = merge * patch
            grid = functools.partial(torch.tensor, [[1, edge, edge]] * b)
            yield {"pixel_values": self.random(b * (edge // merge) ** 2, wide, wide, planes), "image_grid_thw": grid}
            yield {"pixel_values": self.random(b * edge * edge, wide, wide, planes), "image_grid_thw": grid}
        yield from self.images_in_words(planes)
        yield from self.masked()

    def images_in_words(self, planes: int) -> Iterator[dict[str, Make]]:
        """Give words that have places for what an image becomes, in the ways that models ask for them."""
        b = self.samples
        if not {"input_ids", "pixel_values"} <= set(self.taken):
            return
        for height, width in self.sizes.edges()[:2]:
            if "image_attention_mask" in self.taken:
                yield {
                    "input_ids": self.ids(b, LENGTH),
                    "pixel_values": self.random(b, 1, planes, height, width),
                    "image_attention_mask": self.ones(b, LENGTH, 1),
                }
            count = self.sizes.first("latent_query_num", default=0)
            for name in ("image_embeds_position_mask", "image_mask", "img_mask"):
                if name in self.taken and count:
                    mask = torch.arange(count + LENGTH).expand(b, -1) < count
                    yield {
                        "input_ids": self.ids(b, count + LENGTH),
                        "pixel_values": self.random(b, planes, height, width),
                        name: lambda mask=mask: mask.long().contiguous(),
                    }

    def masked(self) -> Iterator[dict[str, Make]]:
        """Give each argument with a mask of its own, along one dimension or the other, of either type."""
        for mask in [name for name in self.required if re.search(r"mask$|padding$", name)]:
            stem = re.sub(r"_(attention_|padding_)?(mask|padding)$", "", mask)
            for make in self.options(stem) if stem in self.taken and stem != mask else ():
                made = make()
                for axis, dtype in itertools.product((1, 2), (torch.bool, torch.long)):
                    if axis < made.ndim:
                        also = functools.partial(torch.ones, (self.samples, made.shape[axis]), dtype=dtype)
                        yield {stem: lambda made=made: made, mask: also}
                if made.ndim == 2:
                    yield {
                        stem: lambda made=made: made,
                        mask: lambda made=made: torch.zeros(made.shape, dtype=torch.long),
                    }

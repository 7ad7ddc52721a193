"""Batches that a model of transformers may take: by its forward's signature, its docstring and its configuration."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import torch

VOCABULARY, LENGTH = 64, 12
FRAMES, PATCHES = 8, 4  # frames of a sound or a film where nothing says how many; patches along an edge
MOST_OF_EACH = 40  # combinations of what several arguments may be
Batch = dict[str, torch.Tensor]
Batches = Generator[Batch, Exception | None, None]
Make = Callable[[], torch.Tensor]
WANTED = re.compile(  # how torch says which width it expected
    r"to have (\d+) channels|and (\d+)x\d+\)|normalized_shape=\[(\d+)\]|must match the existing size \((\d+)\)"
)

DESCRIBED = re.compile(r"^\s*(\w+) \(`([^`]*)` of shape `?\(([^`]*?),?\)`?", re.MULTILINE)
MAIN = (
    *("input_ids", "pixel_values", "pixel_values_videos", "input_values", "input_features", "past_values"),
    *("flattened_patches", "hidden_states", "latents", "inputs", "states", "inputs_embeds", "audio_codes"),
)


class Sizes:
    """The numbers of a configuration and of those inside it, by name; the outer ones first."""

    def __init__(self, config: Any) -> None:
        self.of: dict[str, list[Any]] = {}
        waiting, seen = [config], set()
        while waiting:
            each = waiting.pop(0)
            if id(each) in seen:
                continue
            seen.add(id(each))
            given = dict(vars(each)) if hasattr(each, "__dict__") else dict(each)
            mapped = getattr(each, "attribute_map", {}) or {}
            given |= {name: given[other] for name, other in mapped.items() if other in given}
            for name, value in given.items():
                if hasattr(value, "model_type") or (isinstance(value, dict) and name.endswith("config")):
                    waiting.append(value)
                elif isinstance(value, int | list | tuple | dict) and not isinstance(value, bool):
                    self.of.setdefault(name, []).append(value)

    def all(self, *names: str) -> list[int]:
        found = [v for name in names for v in self.of.get(name, ()) if isinstance(v, int) and v > 0]
        return list(dict.fromkeys(found))

    def first(self, *names: str, default: int) -> int:
        return next(iter(self.all(*names)), default)

    def like(self, pattern: str, most: int = 4096) -> list[int]:
        names = [name for name in self.of if re.search(pattern, name)]
        return [value for value in self.all(*names) if value <= most]

    def edges(self) -> list[tuple[int, int]]:
        """Heights and widths of images: what the configuration says, then common ones."""
        found: list[tuple[int, int]] = []
        for name in ("image_size", "frame_size", "input_size", "img_size", "spatial_size"):
            for value in self.of.get(name, ()):
                if isinstance(value, dict):
                    value = (value.get("height", 64), value.get("width", 64))
                pair = (value, value) if isinstance(value, int) else tuple(value)[-2:]
                if len(pair) == 2 and all(isinstance(edge, int) and 0 < edge <= 1100 for edge in pair):
                    found.append(pair)  # type: ignore[arg-type]
        return list(dict.fromkeys([*found, (64, 64), (224, 224), (128, 128), (256, 256)]))


class Inputs:
    """What each argument of one model's forward may be."""

    most = MOST_OF_EACH
    again = False  # whether an error said what makes going on with the same arguments useless

    def __init__(self, model: Any, samples: int) -> None:
        self.model, self.samples = model, samples
        self.sizes = Sizes(model.config)
        self.numbers = torch.Generator().manual_seed(1)
        self.learned: dict[int, None] = {}  # widths that errors asked for
        self.named: dict[str, None] = {}  # arguments that errors named
        parameters = inspect.signature(model.forward).parameters.values()
        self.taken = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.required = [p.name for p in parameters if p.name in self.taken and p.default is p.empty]
        found = DESCRIBED.findall(inspect.getdoc(model.forward) or "")
        self.described = {name: (kind, shape) for name, kind, shape in found}
        vocabularies = self.sizes.all("vocab_size", "src_vocab_size", "text_vocab_size") or [VOCABULARY]
        self.words = min(VOCABULARY, *vocabularies) if len(vocabularies) > 1 else min(VOCABULARY, vocabularies[0])

    def random(self, *shape: int) -> Make:
        return lambda: torch.randn(shape, generator=self.numbers, dtype=torch.float64)

    def ones(self, *shape: int) -> Make:
        return lambda: torch.ones(shape, dtype=torch.long)

    def ids(self, *shape: int, least: int = 3, most: int | None = None) -> Make:
        end = max(most or self.words, least + 1)
        return lambda: torch.randint(least, end, shape, generator=self.numbers)

    def tokens(self) -> list[Make]:
        books = self.sizes.all("num_codebooks", "num_quantizers", "n_codes_total", "num_vq_groups")[:2]
        b = self.samples
        several = [self.ids(*shape) for n in books for shape in ((b, n, LENGTH), (b, LENGTH, n), (b * n, LENGTH))]
        return [self.ids(b, LENGTH), *several, *self.marked()]

    def marked(self) -> list[Make]:
        """Words among which each of an image's features has its place, as many as the configuration may mean."""
        marks = self.sizes.all("image_token_id", "image_token_index")
        if not marks or not {"pixel_values", "pixel_values_videos"} & set(self.taken):
            return []
        patch, edge = self.sizes.first("patch_size", default=16), self.sizes.edges()[0][0]
        whole = (edge // patch) ** 2
        counts = self.sizes.all("num_query_tokens", "image_seq_length", "image_seq_len", "mm_tokens_per_image")
        counts = [n for n in dict.fromkeys([*counts, whole, whole + 1, whole // 4]) if 0 < n <= 256][:5]

        def make(count: int) -> torch.Tensor:
            return torch.cat([torch.full((self.samples, count), marks[0]), self.ids(self.samples, LENGTH)()], 1)

        return [functools.partial(make, count) for count in counts]

    def images(self) -> list[Make]:
        b = self.samples
        planes = self.sizes.all("num_channels", "in_channels", "in_chans", "image_channels") or [3, 1]
        planes = list(dict.fromkeys([*planes[:2], *self.learned, 3]))
        frames = self.sizes.all("num_frames", "frames_per_clip", "tubelet_size", "temporal_patch_size") or [2]
        made = [self.random(b, c, *edge) for edge in self.sizes.edges() for c in planes[:3]]
        for edge, c in itertools.product(self.sizes.edges()[:2], planes[:2]):
            made += [self.random(b, t, c, *edge) for t in dict.fromkeys([2, 1, *frames]) if t <= 32]
            made.append(self.random(b, c, frames[0], *edge))
        patch = self.sizes.first("patch_size", default=16)
        wide = planes[0] * patch * patch
        places = torch.arange(PATCHES * PATCHES)
        where = torch.stack([places // PATCHES + 1, places % PATCHES + 1], -1).expand(b, -1, -1).double()
        placed = self.random(b, PATCHES * PATCHES, wide)
        return [*made, placed, lambda: torch.cat([where, placed()], -1)]

    def films(self) -> list[Make]:
        planes = self.sizes.first("num_channels", "in_channels", default=3)
        frames = dict.fromkeys([*self.sizes.all("num_frames", "frames_per_clip"), 2, 4, 8, 16])
        return [
            self.random(self.samples, t, planes, *edge) for edge in self.sizes.edges()[:3] for t in frames if t <= 32
        ]

    def sounds(self) -> list[Make]:
        """Waves, and frames of features in either order, with a width that the configuration knows."""
        b = self.samples
        wide = self.sizes.like(r"mel|bins|feat|input_dim|in_channels|input_size|num_channels", 1024)
        wide = list(dict.fromkeys([*self.learned, *wide, 80, 128, *self.sizes.all("hidden_size")]))
        double = [2 * n for n in self.sizes.all("max_source_positions")]
        length = [n for n in (*double, *self.sizes.all("max_length", "spec_size")) if n <= 3000]
        frames = list(dict.fromkeys([*length, 100, 64, 256, 1024]))
        features = [
            self.random(*shape) for n in wide[:6] for t in frames[:4] for shape in ((b, n, t), (b, t, n), (b, 1, t, n))
        ]
        waves = [self.random(b, 7680), self.random(b, 1, 7680), self.random(b, 2, 7680), self.random(b, 15360)]
        return [*waves, *features]

    def described_as(self, name: str) -> list[Make]:
        """Give what the docstring says, its words taken for what the configuration calls so."""
        kind, shape = self.described.get(name, ("", ""))
        if not shape:
            return []
        known = {"batch_size": self.samples, "bs": self.samples, "num_choices": 2}
        places = []
        for word in (part.strip(" `") for part in shape.split(",")):
            if word.isdigit():
                places.append([int(word)])
            elif word in known:
                places.append([known[word]])
            elif re.search(r"height|width|image_size|frame_size", word):
                places.append([edge[0] for edge in self.sizes.edges()[:2]])
            elif "length" in word or "seq" in word or "time_steps" in word:
                places.append([*self.sizes.all(word), LENGTH][:2])
            else:
                near = self.sizes.all(word, word.removeprefix("num_"), f"num_{word}", f"{word}_size")
                places.append([*near, *self.sizes.all("hidden_size")][:3] or [PATCHES])
        shapes = list(itertools.product(*places))[:8]
        if "Long" in kind or "Int" in kind:
            return [self.ids(*each, least=0, most=2) for each in shapes]
        if "Bool" in kind or name.endswith("mask"):
            return [self.ones(*each) for each in shapes]
        return [self.random(*each) for each in shapes]

    def options(self, name: str) -> list[Make]:
        b = self.samples
        if name in ("labels", "label_ids", "return_dict"):
            return []
        if name.endswith("input_ids") or name in ("ids", "tokens"):
            return self.tokens()
        if name in ("pixel_values", "prompt_pixel_values", "conditional_pixel_values", "flattened_patches"):
            made = self.images()
            return made[::-1] if name == "flattened_patches" else made
        if name == "pixel_values_videos":
            return self.films()
        if name in ("input_values", "input_features", "audio_values", "audio_mel"):
            made = self.sounds()
            return made if name == "input_values" else [*made[4:], *made[:4]]
        if name == "bbox":
            return [lambda: torch.tensor([10, 20, 30, 40]).expand(b, LENGTH, 4).contiguous()]
        if name.endswith("inputs_embeds"):
            wide = [*self.sizes.all("hidden_size", "d_model", "n_embd", "embed_dim")[:3], *self.learned] or [64]
            return [self.random(b, LENGTH, n) for n in wide]
        if name in ("token_type_ids", "mm_token_type_ids"):
            return [lambda: torch.zeros((b, LENGTH), dtype=torch.long)]
        if name in ("attention_mask", "decoder_attention_mask", "qformer_attention_mask"):
            return [self.ones(b, LENGTH), *self.described_as(name)]
        if name == "past_values":
            return self.series()
        described = self.described_as(name)
        if described or not name.endswith(("mask", "states", "latents", "embeds", "inputs")):
            return described
        wide = [*self.sizes.all("hidden_size", "d_model", "hidden_dim")[:2], *self.learned] or [64]
        return [self.ones(b, LENGTH)] if name.endswith("mask") else [self.random(b, LENGTH, n) for n in wide]

    def series(self) -> list[Make]:
        b, context = self.samples, self.sizes.first("context_length", default=32)
        planes = self.sizes.first("num_input_channels", "input_size", default=1)
        return [self.random(b, context, planes), self.random(b, context), self.random(b, context, 1)]

    def joint(self) -> Iterator[dict[str, Make]]:
        """Give arguments that must fit each other: patches with their grid, time series with their marks."""
        b, edge = self.samples, PATCHES
        patch = self.sizes.first("patch_size", default=16)
        planes = self.sizes.first("in_channels", "num_channels", "in_chans", default=3)
        times = self.sizes.first("temporal_patch_size", default=1)
        grid = lambda: torch.tensor([[1, edge, edge]]).expand(b, 3).contiguous()  # noqa: E731
        first = next((n for n in ("hidden_states", "pixel_values") if n in self.taken), "")
        merge = lambda: torch.full((b,), 2)  # noqa: E731
        for name in ("grid_thw", "image_grid_thw", "image_grid_hws", "grid_hws"):
            if name in self.required and first:
                also = {"merge_sizes": merge} if "merge_sizes" in self.taken else {}
                two = (lambda: grid()[:, 1:].contiguous()) if name.endswith("hws") else grid
                for t in dict.fromkeys([times, 1]):
                    yield {first: self.random(b * edge * edge, planes * t * patch * patch), name: two, **also}
                    yield {first: self.random(b * edge * edge, planes * t, patch, patch), name: two, **also}
                    yield {first: self.random(1, b * edge * edge, planes, patch, patch), name: two, **also}
        if "spatial_shapes" in self.taken:
            yield {
                "pixel_values": self.random(b, edge * edge, planes * patch * patch),
                "pixel_attention_mask": self.ones(b, edge * edge),
                "spatial_shapes": lambda: torch.full((b, 2), edge),
            }
        if "pixel_position_ids" in self.taken:
            places = torch.stack(torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij"), -1)
            yield {
                "pixel_values": self.random(b, edge * edge, planes * patch * patch),
                "pixel_position_ids": lambda: places.reshape(1, -1, 2).repeat(b, 1, 1),
            }
        heard = next((n for n in self.taken if re.search(r"(features|values|audio)_(attention_)?mask$", n)), "")
        if "input_features" in self.taken and heard and "input_ids" not in self.taken:
            for make in self.sounds()[4:]:
                made = make()
                for axis in (2, 1) if made.ndim == 3 else ():
                    yield {"input_features": lambda made=made: made, heard: self.ones(b, made.shape[axis])}
        if "past_time_features" in self.taken:
            yield from self.marked_series()
        if "returns_to_go" in self.taken:
            wide = {
                "states": self.sizes.first("state_dim", default=4),
                "actions": self.sizes.first("act_dim", default=2),
            }
            made = {
                name: self.random(b, LENGTH, n) for name, n in (*wide.items(), ("rewards", 1), ("returns_to_go", 1))
            }
            yield {**made, "timesteps": self.ids(b, LENGTH, least=0, most=8), "attention_mask": self.ones(b, LENGTH)}

    def marked_series(self) -> Iterator[dict[str, Make]]:
        b, context = self.samples, self.sizes.first("context_length", "prediction_length", default=16)
        ahead = self.sizes.first("prediction_length", default=4)
        lags = [v for v in self.sizes.of.get("lags_sequence", ()) if isinstance(v, list | tuple)]
        past = context + max(lags[0] if lags else [0])
        features = self.sizes.first("num_time_features", default=0) or 1
        planes = self.sizes.first("input_size", default=1)
        several = (planes,) if planes > 1 else ()
        for n in dict.fromkeys([features, 1, 0, 2]):
            yield {
                "past_values": self.random(b, past, *several),
                "past_time_features": self.random(b, past, n),
                "past_observed_mask": self.ones(b, past, *several),
                "future_values": self.random(b, ahead, *several),
                "future_time_features": self.random(b, ahead, n),
            }

    def batches(self) -> Batches:
        """Give one batch after the other, the likeliest first; once more where errors said which widths they want."""
        yield from self.all_batches()
        if self.learned or self.named:
            self.required += [name for name in self.named if name not in self.required]
            yield from self.all_batches()

    def learn(self, error: Exception | None, batch: Batch) -> None:
        if isinstance(error, TypeError | ValueError) and not self.named:
            words = re.findall(r"\w+", str(error))
            missing = [name for name in self.taken if name in words and name not in batch and self.options(name)]
            self.named.update(dict.fromkeys(missing[:1]))
        found = WANTED.search(str(error)) if error is not None else None
        if found and len(self.learned) < 3:
            self.learned[int(next(filter(None, found.groups())))] = None

    def all_batches(self) -> Batches:
        for joint in self.joint():
            if self.again:
                return
            rest = [name for name in self.required if name not in joint]
            yield from self.made(joint, rest)
        if isinstance(asked := getattr(self.model, "main_input_name", ""), str):
            mains = [name for name in dict.fromkeys((asked, *MAIN)) if name in self.taken]
        else:
            mains = [name for name in MAIN if name in self.taken]
        for main in [*mains, *([] if mains else [""])]:
            needed = dict.fromkeys([*([main] if main else []), *self.required])
            yield from self.made({}, list(needed), labelled=True)
        extras = ["decoder_input_ids", "attention_mask", "bbox", "token_type_ids", "mm_token_type_ids", *MAIN]
        for main, extra in itertools.product(mains, [name for name in extras if name in self.taken]):
            if extra != main:
                needed = dict.fromkeys([main, extra, *self.required])
                yield from self.made({}, list(needed), labelled=True)
        if len(mains) > 1:
            both = dict.fromkeys([*mains[:2], *[n for n in extras[:5] if n in self.taken], *self.required])
            yield from self.made({}, list(both))

    def made(self, given: Mapping[str, Make], names: Iterable[str], labelled: bool = False) -> Batches:
        names = list(names)
        every = [self.options(name) for name in names]
        for choice in itertools.islice(itertools.product(*every), self.most):
            chosen = {**given, **dict(zip(names, choice, strict=True))}
            for labels in [*(self.labels() if labelled and "labels" in self.taken else ()), None]:
                batch = {name: make() for name, make in chosen.items()}
                batch = batch if labels is None else {**batch, "labels": labels}
                self.learn((yield batch), batch)
                if self.again:
                    return

    def labels(self) -> list[torch.Tensor]:
        ids = self.ids(self.samples, LENGTH)()
        classes = max(int(getattr(self.model.config, "num_labels", 2) or 2), 1)
        return [torch.where(ids % 5 == 0, -100, ids), torch.arange(self.samples) % classes]

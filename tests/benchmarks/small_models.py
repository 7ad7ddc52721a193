"""Small models of every family of a library, and a batch for each: what ``library_families`` tries."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small_inputs import Batch, Batches, Inputs
from torch import nn

PARAMETERS = 40_000_000  # a model that is larger is made narrower, or left out
LARGE = 100_000_000  # a model for images, which is not made narrower


class Unsuitable(Exception):
    """No small model of the family, or no input for it, was found."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        find: Gives what makes it on the default device, small in one way after the other.
        batches: Gives batches that a model of the kind may take, by the model and the number of samples; is sent the
            error that the model raised for the last one.
    """

    find: Callable[[], Iterator[Callable[[], nn.Module]]]
    batches: Callable[[nn.Module, int], Batches]

    def batch_for(self, model: nn.Module, samples: int, seconds: float = 4) -> Iterator[tuple[Batch, Any]]:
        """Give the batches that the model takes, each with what the model returns; raise why if there is none."""
        why: Exception | None = None
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        end, taken, last = time.process_time() + seconds, False, None
        given = self.batches(model, samples)
        while True:
            try:
                batch = given.send(last)
            except StopIteration:
                break
            last = None
            batch = {name: part.to(dtype) if part.is_floating_point() else part for name, part in batch.items()}
            try:
                output = model(**copy.deepcopy(batch))
            except Exception as error:
                why, last = why or error, error
            else:
                taken = True
                yield batch, output
            if time.process_time() > end:
                break
        if why is None:
            raise Unsuitable("it has no input of a kind that is known here")
        if not taken:
            raise Unsuitable(f"no input was found: {type(why).__name__}: {str(why).strip().splitlines()[:1]}")


# --- transformers ---

LAYERS = ("layers", "n_layer", "num_blocks", "depth", "num_layer", "layer_num", "num_hidden_groups")
WIDE = {  # what a name contains, and what it is at most
    "head_dim": 16,
    "intermediate": 64,
    "ffn": 64,
    "n_inner": 64,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "projection_dim": 32,
    "d_ff": 64,
    "d_kv": 16,
    "experts": 8,
    "lora_rank": 16,
}
HEADS = ("attention_heads", "num_heads", "n_head", "key_value_heads")
WORDS = ("vocab_size", "num_buckets", "max_position", "n_positions", "image_size", "num_labels", "_token", "_id")
KEPT = re.compile(r"patch|kernel|stride|sampling_rate|hop|pool|scale|factor|group|ratio|length|head|frames|channels$")
SERIES = ("informer", "autoformer", "time_series_transformer")
NEEDED = {  # what a configuration's defaults leave to the user
    "xmod": {"default_language": "en_XX"},
    **{name: {"prediction_length": 4, "context_length": 12} for name in SERIES},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
HOW = (  # ways to make a configuration small, and how many parameters are small; a number divides its widths
    *(("narrow", 10_000_000), ("few layers", 10_000_000), ("4", PARAMETERS), ("8", PARAMETERS), ("2", PARAMETERS)),
    *(("16", PARAMETERS), ("narrow", PARAMETERS), ("few layers", PARAMETERS), ("whole", PARAMETERS)),
)


def shrunk(config: Any, how: str) -> Any:
    """Make a configuration, and those inside it, small: few layers and words; as ``how`` says, narrow too."""
    if how == "whole":
        return config
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrunk(value, how)
        elif name in ("depths", "num_layers", "layers", "num_block_repeats") and isinstance(value, list | tuple):
            _set(config, name, type(value)(min(v, 2) if isinstance(v, int) else v for v in value))
        elif isinstance(value, list | tuple) and how == "narrow" and (most := _most(name)) is not None:
            _set(config, name, type(value)(min(v, most) if type(v) is int else v for v in value))
        elif isinstance(value, list | tuple) and how.isdigit() and not KEPT.search(name):
            if value and all(isinstance(v, int) and v % int(how) == 0 and v >= 4 * int(how) for v in value):
                _set(config, name, type(value)(v // int(how) for v in value))
        elif isinstance(value, float) and name == "depth_coefficient" and value > 1 and how != "few layers":
            _set(config, name, 1.0)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name.endswith(LAYERS) and value > 2 and "mtp" not in name:
            _set(config, name, 2)
        elif "vocab_size" in name and value > 2048:
            _set(config, name, 2048)
        elif name == "max_length" and value > 256 and how != "few layers":
            _set(config, name, 128)
        elif name == "image_size" and value > 64 and how == "narrow":
            patch = getattr(config, "patch_size", None)
            _set(config, name, 4 * patch if isinstance(patch, int) and patch >= 8 else 64)
        elif name == "image_size" and value > 256 and how != "few layers":
            patch = getattr(config, "patch_size", None)
            _set(config, name, 8 * patch if isinstance(patch, int) else 256)
        elif how == "narrow" and any(name.endswith(part) for part in HEADS) and value > 4:
            _set(config, name, 4)
        elif how == "narrow":
            most = _most(name)
            if most is not None and value > most:
                _set(config, name, most)
        elif how.isdigit() and "experts" in name and "tok" not in name and value > 8:
            _set(config, name, 8)
        elif how.isdigit() and _divided(name, value, int(how)):
            _set(config, name, value // int(how))
    words = getattr(getattr(config, "text_config", config), "vocab_size", None)
    asked = [name for name in vars(config) if name.endswith(("token_id", "token_index"))]
    for place, name in enumerate(asked if isinstance(words, int) else ()):
        value = getattr(config, name)
        if value >= words if isinstance(value, int) else value is None and name.startswith(("image", "video")):
            _set(config, name, words - 1 - place)  # what marks images and what marks films are two words
    if getattr(config, "num_key_value_heads", 1) is None:
        _set(config, "num_key_value_heads", getattr(config, "num_attention_heads", None))
    kinds = getattr(config, "layer_types", None)
    number = getattr(config, "num_hidden_layers", None)
    if isinstance(kinds, list) and isinstance(number, int) and len(kinds) > number:
        _set(config, "layer_types", kinds[:number])
    with contextlib.suppress(Exception):  # one of several widths of heads
        _fit_sections(config)
    if getattr(config, "use_cache", None):
        _set(config, "use_cache", False)
    return config


def _fit_sections(config: Any) -> None:
    """Make the parts of a head that turn with time, height and width as wide as half of what turns."""
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "head_dim"))
    if width is None and isinstance(heads, int) and isinstance(getattr(config, "hidden_size", None), int):
        width = config.hidden_size // heads
    for name in ("rope_parameters", "rope_scaling"):
        given = getattr(config, name, None)
        if not isinstance(given, dict) or not isinstance(width, int):
            continue
        sections = given.get("mrope_section") or ([1, 1, 1] if "mrope_section" in _code_for(type(config)) else None)
        turning = given.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1
        half = int(width * turning) // 2
        if sections and half != sum(sections):
            fitting = [max(1, part * half // sum(sections)) for part in sections]
            fitting[0] += half - sum(fitting)
            _set(config, name, {**given, "mrope_section": fitting})


@functools.cache
def _code_for(config: type) -> str:
    path = Path(inspect.getfile(config))
    beside = path.with_name(path.name.replace("configuration", "modeling"))
    return beside.read_text(encoding="utf-8") if beside != path and beside.exists() else ""


def _most(name: str) -> int | None:
    """Give the largest width that a narrow model has by this name; None where it is no width."""
    return next((most for part, most in WIDE.items() if part in name), None)


def _divided(name: str, value: int, by: int) -> bool:
    """Whether a number is a width: everything large that divides, but for what counts words, pixels and moments."""
    if name == "head_dim" or name.endswith("head_dim"):
        return value % by == 0 and value // by >= 4
    return value % by == 0 and value >= 16 * by and not any(w in name for w in WORDS) and not KEPT.search(name)


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property that another attribute decides
        return


def class_of_each_type() -> dict[str, str]:
    """One class for each model type: for language modelling, else with a head, else the bare model."""
    from transformers.models.auto import modeling_auto as auto

    tables = [
        *("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT"),
        *("MODEL_FOR_MASKED_LM", "MODEL_FOR_PRETRAINING", "MODEL_FOR_SEQUENCE_CLASSIFICATION"),
        *("MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_CTC", "MODEL"),
    ]
    found: dict[str, str] = {}
    for table in tables:
        names = getattr(auto, f"{table}_MAPPING_NAMES", {})
        for model_type, name in names.items():
            found.setdefault(model_type, name if isinstance(name, str) else name[0])
    return found


def find_hugging_face(model_type: str, name: str) -> Iterator[Callable[[], nn.Module]]:
    import transformers
    from transformers import CONFIG_MAPPING

    kind, why, found = getattr(transformers, name, None), Unsuitable("too large"), False
    if kind is None:
        raise Unsuitable(f"the library names {name} and has it not")
    for how, most in HOW:
        try:
            config = shrunk(CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {})), how)
            if not hasattr(config, "vocab_size") and name.endswith("ForCausalLM"):  # a part of a larger one's
                config = config.get_text_config()
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
        except Exception as error:
            why = Unsuitable(f"no small configuration: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            continue
        if size <= most:
            found = True
            yield functools.partial(made, kind, config)
        why = Unsuitable(f"{size / 1e6:.0f} M parameters with few layers")
    if not found:
        raise why


def made(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    return kind(copy.deepcopy(config))


def hugging_face_batches(model: nn.Module, samples: int) -> Batches:
    return Inputs(model, samples).batches()


def hugging_face_cases() -> dict[str, Case]:
    import transformers

    transformers.logging.set_verbosity_error()
    return {
        f"{model_type} ({name})": Case(functools.partial(find_hugging_face, model_type, name), hugging_face_batches)
        for model_type, name in class_of_each_type().items()
    }


# --- torchvision, timm ---

TINY = (
    "test",
    "atto",
    "femto",
    "pico",
    "nano",
    "tiny",
    "micro",
    "mini",
    "xxs",
    "xs",
    "small",
    "_s_",
    "b0",
    "lite",
    "18",
)


def smallest(names: list[str]) -> str:
    def rank(name: str) -> tuple[int, int, str]:
        return next((place for place, part in enumerate(TINY) if part in f"{name}_"), len(TINY)), len(name), name

    return min(names, key=rank)


def find_vision(library: str, name: str) -> Iterator[Callable[[], nn.Module]]:
    import timm
    import torchvision

    if library == "timm":
        make = functools.partial(timm.create_model, name, pretrained=False)
    else:
        options = {"weights": None}
        if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None
        make = functools.partial(torchvision.models.get_model, name, **options)
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in make().parameters())
    except NotImplementedError:  # its initialisation reads values
        size = sum(parameter.numel() for parameter in make().parameters())
    if size > LARGE:
        raise Unsuitable(f"{size / 1e6:.0f} M parameters")
    yield make


def vision_batches(model: nn.Module, samples: int) -> Batches:
    numbers = torch.Generator().manual_seed(1)
    asked = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    given = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD] or ["x"]
    edges = [(3, 64, 64), (3, 96, 96), (3, 128, 128), tuple(asked), (3, 224, 224), (3, 8, 64, 64), (3, 16, 112, 112)]
    for shape in dict.fromkeys(edges):
        yield {name: torch.randn((samples, *shape), generator=numbers, dtype=torch.float64) for name in names}


def vision_cases() -> dict[str, Case]:
    import timm
    import torchvision

    families: dict[tuple[str, str], list[str]] = {}
    for name in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        families.setdefault(("torchvision", module), []).append(name)
    for module in timm.list_modules():
        found = timm.list_models(module=module)
        if found:
            families["timm", module] = found
    return {
        f"{library} {family} ({smallest(names)})": Case(
            functools.partial(find_vision, library, smallest(names)), vision_batches
        )
        for (library, family), names in families.items()
    }

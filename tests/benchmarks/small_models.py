"""Small models of every family of a library, and a batch for each: what ``library_families`` tries."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PARAMETERS = 30_000_000  # a model that is larger is made narrower, or left out
VOCABULARY, LENGTH = 128, 12
Batch = dict[str, torch.Tensor]


class Unsuitable(Exception):
    """No small model of the family, or no input for it, was found."""


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        find: Finds how small it has to be; gives what makes it on the default device.
        batches: Gives batches that a model of the kind may take, by the model and the number of samples.
    """

    find: Callable[[], Callable[[], nn.Module]]
    batches: Callable[[nn.Module, int], Iterator[Batch]]

    def batch_for(self, model: nn.Module, samples: int) -> tuple[Batch, Any]:
        """Find a batch that the model takes; gives it, and what the model returns."""
        why: Exception = Unsuitable("it has no input of a kind that is known here")
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for batch in self.batches(model, samples):
            batch = {name: part.to(dtype) if part.is_floating_point() else part for name, part in batch.items()}
            try:
                return batch, model(**copy.deepcopy(batch))
            except Exception as error:
                why = error
        raise Unsuitable(f"no input was found: {type(why).__name__}: {str(why).strip().splitlines()[:1]}")


# --- transformers ---

LAYERS = ("layers", "n_layer", "num_blocks", "depth", "num_layer", "layer_num")
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
    "experts": 4,
    "lora_rank": 16,
}
HEADS = ("attention_heads", "num_heads", "n_head", "key_value_heads")


def shrunk(config: Any, narrow: bool) -> Any:
    """Make a configuration, and those inside it, small: few layers and words; where asked, narrow too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrunk(value, narrow)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name.endswith(LAYERS) and value > 2 and "mtp" not in name:
            _set(config, name, 2)
        elif "vocab_size" in name and value > 2048:
            _set(config, name, 2048)
        elif narrow and any(name.endswith(part) for part in HEADS) and value > 4:
            _set(config, name, 4)
        elif narrow:
            least = next((most for part, most in WIDE.items() if part in name and value > most), None)
            if least is not None:
                _set(config, name, least)
    kinds = getattr(config, "layer_types", None)
    number = getattr(config, "num_hidden_layers", None)
    if isinstance(kinds, list) and isinstance(number, int) and len(kinds) > number:
        _set(config, "layer_types", kinds[:number])
    if getattr(config, "use_cache", None):
        _set(config, "use_cache", False)
    return config


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


def find_hugging_face(model_type: str, name: str) -> Callable[[], nn.Module]:
    import transformers
    from transformers import CONFIG_MAPPING

    kind, why = getattr(transformers, name), Unsuitable("too large")
    for narrow in (False, True):
        config = shrunk(CONFIG_MAPPING[model_type](), narrow)
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
        except Exception as error:
            why = Unsuitable(f"no small configuration: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
            continue
        if size <= PARAMETERS:
            return lambda: kind(copy.deepcopy(config))
        why = Unsuitable(f"{size / 1e6:.0f} M parameters with few layers")
    raise why


def hugging_face_batches(model: nn.Module, samples: int) -> Iterator[Batch]:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = torch.Generator().manual_seed(1)
    taken = inspect.signature(model.forward).parameters
    vocabulary = min(getattr(text, "vocab_size", None) or VOCABULARY, VOCABULARY)
    ids = torch.randint(3, vocabulary, (samples, LENGTH), generator=numbers)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers, dtype=torch.float64)

    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", None) or 3
    mel = getattr(config, "num_mel_bins", None) or 80
    labels = getattr(config, "num_labels", 2)
    main = {
        "input_ids": ids,
        "pixel_values": random(samples, channels, int(high), int(wide)),
        "input_values": random(samples, 4000),
        "input_features": random(samples, mel, 2 * (getattr(config, "max_source_positions", None) or 100)),
        "inputs_embeds": random(samples, LENGTH, getattr(text, "hidden_size", None) or 64),
    }
    asked = getattr(model, "main_input_name", "input_ids")
    also = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    pixels = {"pixel_values": main["pixel_values"]} if "pixel_values" in taken else {}
    for given in dict.fromkeys((asked, *main)):
        if given not in taken or given not in main:
            continue
        inputs = {given: main[given]}
        for more in ({}, also, pixels):
            if "labels" in taken:
                yield {**inputs, **more, "labels": torch.where(ids % 5 == 0, -100, ids)}
                yield {**inputs, **more, "labels": torch.arange(samples) % max(labels, 1)}
            yield {**inputs, **more}


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
    "_s",
    "b0",
    "lite",
    "18",
)


def smallest(names: list[str]) -> str:
    def rank(name: str) -> tuple[int, int, str]:
        return next((place for place, part in enumerate(TINY) if part in name), len(TINY)), len(name), name

    return min(names, key=rank)


def find_vision(library: str, name: str) -> Callable[[], nn.Module]:
    import timm
    import torchvision

    if library == "timm":
        make = functools.partial(timm.create_model, name, pretrained=False)
    else:
        options = {"weights": None}
        if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None
        make = functools.partial(torchvision.models.get_model, name, **options)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make().parameters())
    if size > 2 * PARAMETERS:
        raise Unsuitable(f"{size / 1e6:.0f} M parameters")
    return make


def vision_batches(model: nn.Module, samples: int) -> Iterator[Batch]:
    numbers = torch.Generator().manual_seed(1)
    asked = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    first = next(iter(inspect.signature(model.forward).parameters), "x")
    sizes: list[tuple[int, ...]] = [(3, 64, 64), tuple(asked), (3, 8, 64, 64)]
    for shape in sizes:
        yield {first: torch.randn((samples, *shape), generator=numbers, dtype=torch.float64)}


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

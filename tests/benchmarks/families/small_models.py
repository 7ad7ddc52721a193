"""Small models of every family of a library, and a batch for each: what ``library_families`` tries."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.benchmarks.families.further_inputs import FurtherInputs
from tests.benchmarks.families.repairs import Repairs, fitting, lessened, size_of
from tests.benchmarks.families.small_inputs import Batch, Batches, Inputs

PARAMETERS = 40_000_000  # a model that is larger is made narrower, or left out
LARGE = 100_000_000  # a model for images, which is not made narrower
LARGEST = 140_000_000  # the same where nothing smaller is found


class Unsuitable(Exception):
    """No small model of the family, or no input for it, was found."""


Found = Generator[Callable[[], nn.Module], Exception | None, None]


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        find: Gives what makes it on the default device, small in one way after the other.
        batches: Gives batches that a model of the kind may take, by the model and the number of samples; is sent the
            error that the model raised for the last one.
        further: The same two where those gave nothing; ``find`` is sent the error of the likeliest batch, if any.
    """

    find: Callable[[], Found]
    batches: Callable[[nn.Module, int], Batches]
    further: Case | None = None

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
            except RuntimeError as error:  # too large a one
                why = why or error
                break
            if last is not None:
                traceback.clear_frames(last.__traceback__)  # they hold all that the model had computed
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
            raise Unsuitable(f"no input was found: {type(why).__name__}: {str(why).strip().splitlines()[:1]}") from why


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
KINDS, TURNING = ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 10000.0}
NEEDED = {  # what a configuration's defaults leave to the user
    "xmod": {"default_language": "en_XX"},
    **{name: {"prediction_length": 4, "context_length": 12} for name in SERIES},
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 9}},
    **{name: {"rope_parameters": dict.fromkeys(KINDS, TURNING)} for name in ("cohere_compass_text",)},
    "cohere_compass": {"text_config": {"rope_parameters": dict.fromkeys(KINDS, TURNING)}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]]},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
HOW = (  # ways to make a configuration small, and how many parameters are small; a number divides its widths
    *(("narrow", 10_000_000), ("few layers", 10_000_000), ("4", PARAMETERS), ("8", PARAMETERS), ("2", PARAMETERS)),
    *(("16", PARAMETERS), ("narrow", PARAMETERS), ("few layers", PARAMETERS), ("whole", PARAMETERS)),
)

FURTHER = (  # the same where no input was found for those
    *(("16", PARAMETERS), ("narrow", PARAMETERS), ("few layers", LARGE), ("deep", PARAMETERS), ("8", PARAMETERS)),
    *(("whole", LARGE), ("4", PARAMETERS), ("2", LARGE)),
)
REPAIRS = 10  # of one configuration


def shrunk(config: Any, how: str) -> Any:
    """Make a configuration, and those inside it, small: few layers and words; as ``how`` says, narrow too."""
    if how == "whole":
        return config
    deep, how = how == "deep", "narrow" if how == "deep" else how
    layers = 8 if deep else 2
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrunk(value, "deep" if deep else how)
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
        elif name.endswith(LAYERS) and value > layers and "mtp" not in name:
            _set(config, name, layers)
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
    with contextlib.suppress(Exception):  # one that differs from layer to layer
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
            fitting[-1 if fitting[0] == fitting[1] else 0] += half - sum(fitting)
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


def named_class(name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise Unsuitable(f"the library names {name} and has it not")
    return kind


def find_hugging_face(model_type: str, name: str) -> Found:
    from transformers import CONFIG_MAPPING

    kind, why, found = named_class(name), Unsuitable("too large"), False
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


def find_further(model_type: str, name: str) -> Found:
    """Find a configuration that the class takes by mending one for each error that building or calling it raises."""
    from transformers import CONFIG_MAPPING

    kind, why, found = named_class(name), Unsuitable("too large"), False
    for how, most in FURTHER:
        try:
            several = fitting(kind, shrunk(CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {})), how))
        except Exception as error:
            why = _not_built(error)
            continue
        for place, config in enumerate(several):
            repairs = Repairs(config)
            for _ in range(REPAIRS):
                try:
                    if size_of(kind, config)[0] > most:
                        repairs.config = config = lessened(kind, config, most)
                    size = size_of(kind, config)[0]
                except Exception as error:
                    failed: Exception | None = error
                    why = why if place else _not_built(error)
                else:
                    if size > most:
                        why = Unsuitable(f"{size / 1e6:.0f} M parameters at least")
                        break
                    found = True
                    failed = yield functools.partial(made, kind, copy.deepcopy(config))
                if failed is None or not repairs.mend(failed):
                    break
                shrunk(config, how)
    if not found:
        raise why


def _not_built(error: Exception) -> Unsuitable:
    text = [line.strip() for line in str(error).splitlines() if line.strip()][:1]
    return Unsuitable(f"no small configuration: {type(error).__name__}: {text}")


def made(kind: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    return kind(copy.deepcopy(config))


def hugging_face_batches(model: nn.Module, samples: int) -> Batches:
    return Inputs(model, samples).batches()


def further_batches(model: nn.Module, samples: int) -> Batches:
    return FurtherInputs(model, samples).batches()


def hugging_face_cases() -> dict[str, Case]:
    import transformers

    transformers.logging.set_verbosity_error()
    return {
        f"{model_type} ({name})": Case(
            functools.partial(find_hugging_face, model_type, name),
            hugging_face_batches,
            Case(functools.partial(find_further, model_type, name), further_batches),
        )
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


def find_vision(library: str, name: str) -> Found:
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


def find_less(library: str, name: str) -> Found:
    """Find a model of fewer layers where the library's builder takes their number, else one of a larger size."""
    import timm
    import torchvision

    make: Callable[..., nn.Module] = functools.partial(torchvision.models.get_model, name, weights=None)
    if library == "timm":
        make = functools.partial(timm.create_model, name, pretrained=False)
    for options in ({"depth": 2}, {"num_layers": 2}, {}):
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in make(**options).parameters())
        except Exception:  # it knows no such number, or reads values of its weights
            continue
        if size <= LARGEST:
            yield functools.partial(make, **options)
        elif not options:
            raise Unsuitable(f"{size / 1e6:.0f} M parameters")


def vision_batches_of_its_size(model: nn.Module, samples: int) -> Batches:
    asked = (getattr(model, "default_cfg", None) or {}).get("input_size", (3, 224, 224))
    for shape in ((3, 32, 32), tuple(asked), (3, 16, 224, 224)):
        yield {"x": torch.randn((samples, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


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
            functools.partial(find_vision, library, smallest(names)),
            vision_batches,
            Case(functools.partial(find_less, library, smallest(names)), vision_batches_of_its_size),
        )
        for (library, family), names in families.items()
    }

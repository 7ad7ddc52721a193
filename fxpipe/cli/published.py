"""A model of transformers from its config alone: built on meta, without weights and without a network."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxpipe.cli.shapes import ExampleSize
from fxpipe.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DEFAULT_SEQUENCE = 2048
HEADS = ("CausalLM", "Seq2SeqLM", "MaskedLM", "ImageClassification", "AudioClassification", "SequenceClassification")
"""What a config without ``architectures`` is taken for: the first of these that its family has."""


def load_config(path: str) -> PreTrainedConfig:
    """Read a ``config.json``.

    Raises:
        PlanError: It is no config, or of a family that the installed transformers does not know.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read {path}: {error}\n  give a Hugging Face config.json") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise PlanError(f"{path} is no Hugging Face config: it has no model_type\n  give the model's own config.json")
    return read_config(data, path)


def read_config(data: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """Make a config of its fields.

    Args:
        data: The fields, ``model_type`` among them.
        source: Where they come from, for messages.
    """
    transformers = _transformers()
    fields = dict(data)
    family = fields.pop("model_type")
    try:
        config: PreTrainedConfig = transformers.AutoConfig.for_model(family, **fields)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(
            f"{source} cannot be read as a config of {family}: {reason}\n  install a transformers that knows it"
        ) from error
    return config


def model_of(config: PreTrainedConfig, example: ExampleSize) -> tuple[PreTrainedModel, tuple[()], dict[str, Any]]:
    """Build the model of a config on the default device, and an example batch for it.

    Args:
        config: Of a model with a loss: the class that ``architectures`` names, else the first of ``HEADS``.
        example: Sizes of the batch.

    Raises:
        PlanError: The class is unknown, or what it takes as input is.
    """
    import torch

    transformers = _transformers()
    dtype = getattr(torch, example.dtype or "bfloat16", None)
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"unknown dtype {example.dtype!r}\n  write float32, bfloat16 or float16")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # of no use in training
    names = getattr(config, "architectures", None) or ()
    cls = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    model: PreTrainedModel | None = None
    if cls is not None:
        model = cls._from_config(config, dtype=dtype)
    for head in HEADS if model is None else ():
        known = getattr(transformers, f"AutoModelFor{head}")
        if type(config) in known._model_mapping:
            model = known.from_config(config, dtype=dtype)
            break
    if model is None:
        raise PlanError(
            f"transformers has no model with a loss for {config.model_type}\n"
            "  write a function that builds the model and its example: FILE.py:FUNCTION"
        )
    return model, (), _batch(model, config, example, dtype)


def _batch(model: PreTrainedModel, config: PreTrainedConfig, example: ExampleSize, dtype: Any) -> dict[str, Any]:
    """Make inputs and labels: token ids real, since models look at them; images and sounds without memory."""
    import torch

    takes = inspect.signature(model.forward).parameters
    rows = example.batch
    main = model.main_input_name
    batch: dict[str, Any] = {}
    if main == "input_ids":
        text = config.get_text_config()
        most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or DEFAULT_SEQUENCE
        tokens = example.sequence or min(most, DEFAULT_SEQUENCE)
        ids = torch.arange(rows * tokens, device="cpu").reshape(rows, tokens) % max(text.vocab_size - 8, 1)
        batch["input_ids"] = labels = ids
    elif main == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        batch["pixel_values"] = torch.zeros(rows, getattr(config, "num_channels", 3), height, width, dtype=dtype)
        labels = torch.zeros(rows, dtype=torch.long, device="cpu")
    elif main == "input_features":
        frames = 2 * config.max_source_positions
        batch["input_features"] = torch.zeros(rows, config.num_mel_bins, frames, dtype=dtype)
        labels = torch.zeros(rows, example.sequence or 128, dtype=torch.long, device="cpu")
    else:
        raise PlanError(
            f"{type(model).__name__} takes {main}, of which no example can be made\n"
            "  write a function that builds the model and its example: FILE.py:FUNCTION"
        )
    if "labels" in takes:
        batch["labels"] = labels
        if main == "input_ids" and not _gives_tokens(model):
            batch["labels"] = torch.zeros(rows, dtype=torch.long, device="cpu")
    return batch


def _gives_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's output head is as wide as its vocabulary, so that its labels are tokens."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head is not None


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its remarks on token ids say nothing about a plan
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise PlanError("configs and built-in shapes need transformers\n  pip install 'fxpipe[hf]'") from error
    return transformers

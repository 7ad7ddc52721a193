"""Sizes of well-known models, for a first look without any file: numbers alone; the models are transformers'."""

from __future__ import annotations

from dataclasses import dataclass

Sizes = tuple[tuple[str, int | float | bool | str], ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model.

    Attributes:
        model_type: The family, by transformers' name.
        sizes: Fields of its config.
    """

    model_type: str
    sizes: Sizes


@dataclass(frozen=True, slots=True)
class ExampleSize:
    """The example batch of a model that is given by its sizes alone.

    Attributes:
        batch: Samples.
        sequence: Tokens of each; None for what suits the model.
        dtype: Name of the weights' dtype; None for bfloat16.
        given: The options that asked for any of these.
    """

    batch: int
    sequence: int | None = None
    dtype: str | None = None
    given: tuple[str, ...] = ()

    @classmethod
    def asked(cls, batch: int | None, usual: int, sequence: int | None, dtype: str | None) -> ExampleSize:
        """Take what was asked for, and the usual batch where none was."""
        options = (("--batch", batch), ("--sequence", sequence), ("--dtype", dtype))
        given = tuple(name for name, value in options if value is not None)
        return cls(usual if batch is None else batch, sequence, dtype, given)


def _gpt2(layers: int, width: int, heads: int) -> Shape:
    return Shape("gpt2", (("n_layer", layers), ("n_embd", width), ("n_head", heads)))


def _llama(layers: int, width: int, inner: int, heads: int, groups: int, *, tied: bool = False) -> Shape:
    return Shape(
        "llama",
        (
            ("num_hidden_layers", layers),
            ("hidden_size", width),
            ("intermediate_size", inner),
            ("num_attention_heads", heads),
            ("num_key_value_heads", groups),
            ("vocab_size", 128_256),
            ("max_position_embeddings", 131_072),
            ("tie_word_embeddings", tied),
        ),
    )


SHAPES: dict[str, Shape] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-1b": _llama(16, 2048, 8192, 32, 8, tied=True),
    "llama-3b": _llama(28, 3072, 8192, 24, 8, tied=True),
    "llama-8b": _llama(32, 4096, 14_336, 32, 8),
    "llama-70b": _llama(80, 8192, 28_672, 64, 8),
    "llama-405b": _llama(126, 16_384, 53_248, 128, 8),
    "mixtral-8x7b": Shape(
        "mixtral",
        (
            ("num_hidden_layers", 32),
            ("hidden_size", 4096),
            ("intermediate_size", 14_336),
            ("num_attention_heads", 32),
            ("num_key_value_heads", 8),
            ("num_local_experts", 8),
            ("num_experts_per_tok", 2),
            ("vocab_size", 32_000),
            ("max_position_embeddings", 32_768),
        ),
    ),
    "t5-large": Shape(
        "t5",
        (
            ("num_layers", 24),
            ("d_model", 1024),
            ("d_kv", 64),
            ("d_ff", 4096),
            ("num_heads", 16),
            ("vocab_size", 32_128),
            ("decoder_start_token_id", 0),  # as every published config has it
        ),
    ),
    "bert-large": Shape(
        "bert",
        (
            ("num_hidden_layers", 24),
            ("hidden_size", 1024),
            ("intermediate_size", 4096),
            ("num_attention_heads", 16),
        ),
    ),
    "vit-large": Shape(
        "vit",
        (
            ("num_hidden_layers", 24),
            ("hidden_size", 1024),
            ("intermediate_size", 4096),
            ("num_attention_heads", 16),
            ("patch_size", 16),
            ("image_size", 224),
        ),
    ),
}
"""Built-in shapes by the name a person types."""

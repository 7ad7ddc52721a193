"""Models of the end-to-end tests: tiny, random, in float64, each with a batch of twelve samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BATCH = 12
LENGTH = 6
WORDS = 19


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch, and what is known of its loss.

    ``per_token`` says that the loss is a float64 mean over samples or tokens, so that the step equals the full batch.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    per_token: bool = True
    leaves: tuple[str, ...] = ()


def numbers(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, WORDS, (BATCH, length), generator=numbers(seed))


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    """Labels of which samples have different numbers, so that no microbatch weighs like another."""
    labels = tokens.clone()
    for row in range(BATCH):
        labels[row, : row % (tokens.shape[1] - 1)] = -100
    return labels


def token_loss(output: Any, target: torch.Tensor) -> torch.Tensor:
    """A mean over valid targets in the output's own precision (Hugging Face computes its own in float32)."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def huggingface(family: str, config: dict[str, Any], model: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, model)(getattr(transformers, family)(**config))
        return made.train()

    return build


SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SMALL,
    "hidden_size": 8,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def causal_batch() -> dict[str, Any]:
    return {"input_ids": ids(), "target": labels_of(ids(seed=1))}


def seq2seq_batch() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(5, seed=1), "target": labels_of(ids(5, seed=2))}


class Residual(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.second(F.gelu(self.first(self.norm(x)))))


class Street(nn.Module):
    """A tied head, a skip from the first block to the last, and a second input that is read late."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList(Residual(8, dropout) for _ in range(8))
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        x = skip = self.embed(tokens)
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place == 1:
                skip = x
        return self.head((x + skip) * gain[:, None, None])


def street_batch() -> dict[str, Any]:
    gain = torch.rand(BATCH, generator=numbers(3), dtype=torch.float64) + 0.5
    return {"tokens": ids(), "gain": gain, "target": labels_of(ids(seed=1))}


class UNet(nn.Module):
    """Convolutions down and up again, each level joined with its own way down."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 4, 6, 8]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.middle = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * b, a, 2, 2) for a, b in itertools.pairwise(widths))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        kept = []
        for layer in self.down:
            image = F.relu(layer(image))
            kept.append(image)
        for layer in self.middle:
            image = torch.tanh(layer(image))
        for layer in reversed(self.up):
            image = layer(torch.cat([image, kept.pop()], dim=1))
        return image


def image_batch() -> dict[str, Any]:
    image = torch.randn(BATCH, 3, 8, 8, generator=numbers(4), dtype=torch.float64)
    return {"image": image, "target": torch.randn(BATCH, 3, 8, 8, generator=numbers(5), dtype=torch.float64)}


GPT2 = {**SMALL, "n_positions": 16, "n_embd": 8, "n_layer": 8, "n_head": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {
    "vocab_size": WORDS,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 2,
}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "dropout_rate": 0.0}
MOE = {**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2, "attn_implementation": "eager"}
MOE |= {"experts_implementation": "eager"}  # grouped matrix products have no float64

CASES = {
    "street": Case(Street, street_batch, token_loss),
    "gpt2": Case(huggingface("GPT2Config", GPT2, "GPT2LMHeadModel"), causal_batch, token_loss),
    "llama": Case(huggingface("LlamaConfig", DECODER, "LlamaForCausalLM"), causal_batch, token_loss),
    "t5": Case(huggingface("T5Config", T5, "T5ForConditionalGeneration"), seq2seq_batch, token_loss),
    "unet": Case(UNet, image_batch, F.mse_loss),
    "mixtral": Case(huggingface("MixtralConfig", MOE, "MixtralForCausalLM"), causal_batch, token_loss),
}

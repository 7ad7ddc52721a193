"""Tiny models of transformers, each with a batch: what directories are written by, and read into."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

WORDS = 19
BATCH = 4


@dataclasses.dataclass(frozen=True)
class Family:
    """A model of transformers by name, its configuration, and how many stages it can be cut into."""

    model: str
    config: str
    options: dict[str, Any]
    inputs: str = "tokens"

    def build(self, device: str = "meta") -> nn.Module:
        import transformers

        torch.manual_seed(3)
        config = getattr(transformers, self.config)(**self.options)
        with torch.device(device):
            return getattr(transformers, self.model)(config).eval()

    def batch(self) -> dict[str, Any]:
        numbers = torch.Generator().manual_seed(0)
        ids = torch.randint(3, WORDS, (BATCH, 6), generator=numbers)
        if self.inputs == "image":
            pixels = torch.randn(BATCH, 3, 8, 8, generator=numbers)
            return {"pixel_values": pixels, "labels": torch.arange(BATCH) % 2}
        if self.inputs == "speech":
            return {"input_features": torch.randn(BATCH, 8, 32, generator=numbers), "labels": ids}
        return {"input_ids": ids, "labels": ids}


SMALL = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SMALL,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
EXPERTS = {"experts_implementation": "eager", "num_experts_per_tok": 2}
FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", {**SMALL, "n_positions": 16, "n_embd": 8, "n_layer": 4, "n_head": 2}
    ),
    "llama": Family("LlamaForCausalLM", "LlamaConfig", DECODER),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
        },
    ),
    "bert": Family(
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": 8,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "max_position_embeddings": 16,
        },
    ),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**DECODER, **EXPERTS, "num_local_experts": 3}),
    "qwen3-moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**DECODER, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 6, "head_dim": 4},
    ),
    "deepseek-v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            **EXPERTS,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 6,
            "first_k_dense_replace": 1,
            "q_lora_rank": 6,
            "kv_lora_rank": 4,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 8,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 2,
        },
        "image",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": WORDS,
            "num_mel_bins": 8,
            "d_model": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        "speech",
    ),
}

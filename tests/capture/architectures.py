"""What people train, tiny: a table of models to capture, each with a batch.

Nothing is downloaded: the Hugging Face models are built from configurations, with random weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

VOCABULARY, LENGTH, SAMPLES = 96, 12, 2
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "attention_dropout": 0.1}
GPT = {
    "vocab_size": VOCABULARY,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQUENCE = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model of the table.

    Attributes:
        name: What people call it.
        build: Makes it on the default device.
        batch: Makes a batch of keyword arguments from a seed.
        branches: Whether it branches on floating-point values, so that its blocks stay whole.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    branches: bool = False


def hugging_face(config: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        kind = getattr(transformers, config)
        made = kind(**settings)
        made.use_cache = False
        return getattr(transformers, model)(made)

    return build


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (SAMPLES, length), generator=generator(seed))


def tokens(seed: int) -> Batch:
    """Ids, labels with some to ignore, and a mask that hides nothing."""
    given = ids(seed)
    labels = given.clone()
    labels[:, : 1 + seed % 3] = -100
    return {"input_ids": given, "attention_mask": torch.ones_like(given), "labels": labels}


def padded(seed: int) -> Batch:
    """Like ``tokens``, but the mask hides the end of one sample."""
    batch = tokens(seed)
    batch["attention_mask"][0, -3:] = 0
    batch["labels"][0, -3:] = -100
    return batch


def without_mask(seed: int) -> Batch:
    batch = tokens(seed)
    del batch["attention_mask"]
    return batch


def sentences(seed: int) -> Batch:
    batch = tokens(seed)
    del batch["labels"]
    return {**batch, "labels": torch.tensor([seed % 2, 1])}


def translations(seed: int) -> Batch:
    return {**without_mask(seed), "attention_mask": torch.ones_like(ids(seed)), "labels": ids(seed + 1, LENGTH - 4)}


def pixels(seed: int, size: int = 32) -> torch.Tensor:
    return torch.randn(SAMPLES, 3, size, size, generator=generator(seed))


def images(seed: int) -> Batch:
    return {"pixel_values": pixels(seed), "labels": torch.tensor([seed % 2, 1])}


def segments(seed: int) -> Batch:
    """Most of it is background: else the gradients of a sample's pixels cancel, and rounding is all that is left."""
    labels = (torch.rand(SAMPLES, 32, 32, generator=generator(seed)) < 0.1).long()
    return {"pixel_values": pixels(seed), "labels": labels}


def detections(seed: int) -> Batch:
    return {"pixel_values": pixels(seed)}


def pairs(seed: int) -> Batch:
    given = ids(seed)
    return {
        "input_ids": given,
        "attention_mask": torch.ones_like(given),
        "pixel_values": pixels(seed),
        "return_loss": True,
    }


def waves(seed: int) -> Batch:
    labels = torch.randint(3, 20, (SAMPLES, 2), generator=generator(seed))
    return {"input_values": torch.randn(SAMPLES, 640, generator=generator(seed)), "labels": labels}


def speech(seed: int) -> Batch:
    features = torch.randn(SAMPLES, 8, 40, generator=generator(seed))
    return {"input_features": features, "labels": ids(seed, LENGTH - 4)}


# --- plain torch ---


class Translator(nn.Module):
    """``nn.Transformer`` between embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        hidden = self.transformer(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


class Skips(nn.Module):
    """A U-Net: what the way down makes, the way up reads."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(16), nn.BatchNorm2d(32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(32, 8, 2, 2)])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kept = []
        for convolution, norm in zip(self.down, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
            kept.append(x)
        kept.pop()
        for convolution in self.up:
            x = torch.cat([kept.pop(), F.relu(convolution(x))], 1)
        return F.cross_entropy(self.head(x), labels)


class Recurrent(nn.Module):
    """Two LSTMs over embeddings; the second begins with the state of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.first = nn.LSTM(16, 16, num_layers=2, dropout=0.2, batch_first=True)
        self.second = nn.LSTM(16, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden, state = self.first(self.embed(input_ids))
        hidden, _ = self.second(hidden, state)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.norm(x)))))


class DictOutput(nn.Module):
    """Returns a nested dictionary with the loss in it, None and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, "more": {"states": tuple(states), "none": None, "depth": 3}}


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    hidden: list[torch.Tensor]
    loss: torch.Tensor | None = None


class DataclassOutput(DictOutput):
    """Returns a dataclass, and hands one from block to block."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Result:
        result = Result(x, [])
        for block in self.blocks:
            result = Result(block(result.logits), [*result.hidden, result.logits])
        result.logits = self.head(result.logits)
        if labels is not None:
            result.loss = F.cross_entropy(result.logits.flatten(0, 1), labels.flatten())
        return result


class KeywordOnly(nn.Module):
    """Keyword-only, optional, nested and variadic inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(
        self,
        *parts: torch.Tensor,
        scale: float = 1.0,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        x = sum(parts) * scale
        if mask is not None:
            x = x * mask[..., None]
        if bias is not None:
            x = x + bias
        for block in self.blocks:
            x = block(x) + options["extra"]["shift"]
        return F.mse_loss(self.head(x), options["extra"]["goal"])


class CalledTwice(nn.Module):
    """A block called at the beginning and at the end, another one three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = Block(), Block()
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.outer(x))
        for _ in range(3):
            x = self.inner(x)
        return F.cross_entropy(self.head(self.outer(x)).flatten(0, 1), labels.flatten())


class DirectParameters(nn.Module):
    """Reads parameters and buffers in its own forward, a tied one at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(VOCABULARY, 16).normal_(std=0.1))
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(16)) for _ in range(2)])
        self.register_buffer("seen", torch.zeros(()))
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = F.embedding(input_ids, self.table)
        for scale, block in zip(self.scales, self.blocks, strict=True):
            x = block(x * scale)
        if self.training:
            with torch.no_grad():
                self.seen += labels.ne(-100).sum()
        return F.cross_entropy((x @ self.table.T).flatten(0, 1), labels.flatten())


def sequences(seed: int) -> Batch:
    return {"source": ids(seed), "target": ids(seed + 1, 8), "labels": ids(seed + 2, 8)}


def pictures(seed: int) -> Batch:
    labels = torch.randint(0, 2, (SAMPLES, 16, 16), generator=generator(seed))
    return {"x": torch.randn(SAMPLES, 3, 16, 16, generator=generator(seed)), "labels": labels}


def vectors(seed: int) -> Batch:
    labels = torch.randint(0, 4, (SAMPLES, 6), generator=generator(seed))
    return {"x": torch.randn(SAMPLES, 6, 16, generator=generator(seed)), "labels": labels}


def options(seed: int) -> Batch:
    part = torch.randn(SAMPLES, 6, 16, generator=generator(seed))
    goal = torch.randn(SAMPLES, 6, 4, generator=generator(seed + 1))
    mask = torch.ones(SAMPLES, 6, dtype=torch.long)
    return {"args": (part, part * 2), "scale": 0.5, "mask": mask, "extra": {"goal": goal, "shift": part.flip(1)}}


# --- the table ---

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.1,
}
_DETR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
    "num_labels": 3,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "dropout": 0.1,
}


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"], layer_type="basic"
    )
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(backbone_config=backbone, backbone=None, **_DETR)
    )


def _clip() -> nn.Module:
    import transformers

    text = {**SMALL, "attention_dropout": 0.1}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16))


def _gemma3() -> Callable[[], nn.Module]:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return hugging_face(
        "Gemma3TextConfig", "Gemma3ForCausalLM", **GROUPED, head_dim=8, sliding_window=6, layer_types=kinds
    )


_TABLE = (
    # Decoders.
    Architecture("GPT-2", hugging_face("GPT2Config", "GPT2LMHeadModel", **GPT), tokens),
    Architecture(
        "GPT-Neo",
        hugging_face(
            "GPTNeoConfig",
            "GPTNeoForCausalLM",
            **{key: SMALL[key] for key in ("vocab_size", "hidden_size", "max_position_embeddings")},
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
        ),
        tokens,
    ),
    Architecture("GPT-NeoX", hugging_face("GPTNeoXConfig", "GPTNeoXForCausalLM", **SMALL), tokens),
    Architecture("GPT-J", hugging_face("GPTJConfig", "GPTJForCausalLM", **GPT, rotary_dim=4), tokens),
    Architecture(
        "OPT",
        hugging_face(
            "OPTConfig",
            "OPTForCausalLM",
            **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
            ffn_dim=48,
            word_embed_proj_dim=32,
        ),
        tokens,
    ),
    Architecture(
        "BLOOM",
        hugging_face("BloomConfig", "BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4),
        tokens,
    ),
    Architecture("Llama", hugging_face("LlamaConfig", "LlamaForCausalLM", **GROUPED), tokens),
    Architecture("Mistral", hugging_face("MistralConfig", "MistralForCausalLM", **GROUPED, sliding_window=6), tokens),
    Architecture("Qwen2", hugging_face("Qwen2Config", "Qwen2ForCausalLM", **GROUPED), tokens),
    Architecture("Qwen3", hugging_face("Qwen3Config", "Qwen3ForCausalLM", **GROUPED, head_dim=8), tokens),
    Architecture("Gemma", hugging_face("GemmaConfig", "GemmaForCausalLM", **GROUPED, head_dim=8), tokens),
    Architecture(
        "Gemma-2",
        hugging_face("Gemma2Config", "Gemma2ForCausalLM", **GROUPED, head_dim=8, sliding_window=6),
        tokens,
    ),
    Architecture("Gemma-3", _gemma3(), tokens),
    Architecture("Phi", hugging_face("PhiConfig", "PhiForCausalLM", **SMALL, resid_pdrop=0.1), tokens),
    Architecture("Phi-3", hugging_face("Phi3Config", "Phi3ForCausalLM", **GROUPED, resid_pdrop=0.1), tokens),
    Architecture(
        "Falcon",
        hugging_face(
            "FalconConfig",
            "FalconForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout=0.1,
        ),
        tokens,
    ),
    Architecture("OLMo-2", hugging_face("Olmo2Config", "Olmo2ForCausalLM", **GROUPED), tokens),
    Architecture(
        "StableLM", hugging_face("StableLmConfig", "StableLmForCausalLM", **GROUPED, hidden_dropout=0.1), tokens
    ),
    Architecture(
        "StarCoder2", hugging_face("Starcoder2Config", "Starcoder2ForCausalLM", **GROUPED, residual_dropout=0.1), tokens
    ),
    # Mixtures of experts.
    Architecture(
        "Mixtral",
        hugging_face(
            "MixtralConfig",
            "MixtralForCausalLM",
            **GROUPED,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
        ),
        tokens,
    ),
    Architecture(
        "Qwen3-MoE",
        hugging_face("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **GROUPED, **_EXPERTS, head_dim=8, num_experts=4),
        tokens,
    ),
    Architecture(
        "DeepSeek-V3",
        hugging_face(
            "DeepseekV3Config",
            "DeepseekV3ForCausalLM",
            **GROUPED | {"num_key_value_heads": 4},
            **_EXPERTS,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        tokens,
    ),
    # State space.
    Architecture(
        "Mamba",
        hugging_face(
            "MambaConfig", "MambaForCausalLM", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=4
        ),
        without_mask,
    ),
    # Encoders.
    Architecture("BERT", hugging_face("BertConfig", "BertForMaskedLM", **SMALL), tokens),
    Architecture("RoBERTa", hugging_face("RobertaConfig", "RobertaForMaskedLM", **SMALL), tokens),
    Architecture(
        "DistilBERT",
        hugging_face(
            "DistilBertConfig",
            "DistilBertForMaskedLM",
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=48,
            n_layers=3,
            n_heads=4,
        ),
        tokens,
    ),
    Architecture("ALBERT", hugging_face("AlbertConfig", "AlbertForMaskedLM", **SMALL, embedding_size=16), tokens),
    Architecture(
        "ELECTRA",
        hugging_face("ElectraConfig", "ElectraForSequenceClassification", **SMALL, embedding_size=16),
        sentences,
    ),
    Architecture(
        "DeBERTa-v2",
        hugging_face(
            "DebertaV2Config",
            "DebertaV2ForSequenceClassification",
            **SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
        ),
        sentences,
    ),
    # Encoders and decoders.
    Architecture(
        "T5",
        hugging_face(
            "T5Config",
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        translations,
    ),
    Architecture("BART", hugging_face("BartConfig", "BartForConditionalGeneration", **SEQUENCE), translations),
    Architecture("Marian", hugging_face("MarianConfig", "MarianMTModel", **SEQUENCE), translations),
    Architecture(
        "Whisper",
        hugging_face(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            **SEQUENCE,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
        ),
        speech,
    ),
    # Vision.
    Architecture("ViT", hugging_face("ViTConfig", "ViTForImageClassification", **_VISION), images),
    Architecture(
        "Swin",
        hugging_face(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.1,
        ),
        images,
    ),
    Architecture(
        "ConvNeXt",
        hugging_face(
            "ConvNextConfig",
            "ConvNextForImageClassification",
            hidden_sizes=[8, 16],
            depths=[1, 2],
            num_stages=2,
            drop_path_rate=0.1,
        ),
        images,
    ),
    Architecture(
        "ResNet",
        hugging_face(
            "ResNetConfig",
            "ResNetForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="bottleneck",
        ),
        images,
    ),
    Architecture(
        "SegFormer",
        hugging_face(
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_attention_heads=[1, 2],
            num_encoder_blocks=2,
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            drop_path_rate=0.1,
        ),
        segments,
    ),
    Architecture("DETR", _detr, detections, branches=True),
    # Several kinds of inputs, and sound.
    Architecture("CLIP", _clip, pairs),
    Architecture(
        "Wav2Vec2",
        hugging_face(
            "Wav2Vec2Config",
            "Wav2Vec2ForCTC",
            **SMALL,
            conv_dim=(8, 8),
            conv_kernel=(10, 4),
            conv_stride=(5, 4),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
        ),
        waves,
        branches=True,
    ),
    # Plain torch.
    Architecture("nn.Transformer", Translator, sequences),
    Architecture("U-Net with skips", Skips, pictures),
    Architecture("LSTM", Recurrent, without_mask),
    Architecture("dictionary output", DictOutput, vectors),
    Architecture("dataclass output", DataclassOutput, vectors),
    Architecture("keyword-only inputs", KeywordOnly, options),
    Architecture("module called twice", CalledTwice, vectors),
    Architecture("parameters in forward", DirectParameters, without_mask),
)
ARCHITECTURES: Mapping[str, Architecture] = {architecture.name: architecture for architecture in _TABLE}


def split(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take a batch apart into positional and keyword arguments."""
    named = dict(batch)
    return tuple(named.pop("args", ())), named

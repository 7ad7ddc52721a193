"""Models to plan: published shapes on the meta device, and their layer graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxpipe.ir.graph import LayerGraph


def models() -> dict[str, Callable[[], LayerGraph]]:
    """Name the models, one microbatch of one sequence or image each."""
    return {
        "gpt2-medium": lambda: captured(*gpt2_medium()),
        "llama-8b": lambda: captured(*llama_8b()),
        "t5-large": lambda: captured(*t5_large()),
        "resnet-50": lambda: captured(*resnet_50()),
        "unet": lambda: captured(*unet()),
    }


def captured(model: object, args: Sequence[object], kwargs: dict[str, object]) -> LayerGraph:
    """Capture a model at op grain."""
    from fxpipe.capture.calls.counting import LayerCounter
    from fxpipe.capture.capture import Capture

    capture = Capture(model)
    counter = LayerCounter(capture.skeleton, fused_attention=True)
    return capture.layer_graph(capture.capture(capture.inputs(args, kwargs), grain="op", counter=counter), batch_size=1)


def gpt2_medium() -> tuple[object, tuple[object, ...], dict[str, object]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=24, n_embd=1024, n_head=16, use_cache=False))
    ids = torch.zeros(1, 1024, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


def llama_8b() -> tuple[object, tuple[object, ...], dict[str, object]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ids = torch.zeros(1, 4096, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


def t5_large() -> tuple[object, tuple[object, ...], dict[str, object]]:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, use_cache=False, decoder_start_token_id=0
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    ids = torch.zeros(1, 512, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


def resnet_50() -> tuple[object, tuple[object, ...], dict[str, object]]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Bottleneck(nn.Module):
        def __init__(self, into: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            self.downsample = None
            if stride > 1 or into != 4 * width:
                self.downsample = nn.Sequential(
                    nn.Conv2d(into, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
                )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = F.relu(self.bn1(self.conv1(x)))
            out = F.relu(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
            return F.relu(out + (x if self.downsample is None else self.downsample(x)))

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
            blocks, into = [], 64
            for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
                for index in range(count):
                    blocks.append(Bottleneck(into, width, stride if index == 0 else 1))
                    into = 4 * width
            self.blocks = nn.ModuleList(blocks)
            self.fc = nn.Linear(2048, 1000)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1)), labels)

    with torch.device("meta"):
        model = ResNet()
    return model, (torch.zeros(1, 3, 224, 224), torch.zeros(1, dtype=torch.long)), {}


def unet() -> tuple[object, tuple[object, ...], dict[str, object]]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Double(nn.Module):
        def __init__(self, into: int, out: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(into, out, 3, padding=1), nn.GroupNorm(8, out)
            self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(8, out)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.silu(self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x))))))

    class UNet(nn.Module):
        def __init__(self, width: int = 64, depth: int = 4) -> None:
            super().__init__()
            sizes = [width << level for level in range(depth + 1)]
            self.down = nn.ModuleList([Double(3 if i == 0 else sizes[i - 1], sizes[i]) for i in range(depth)])
            self.middle = Double(sizes[-2], sizes[-1])
            self.lift = nn.ModuleList([nn.ConvTranspose2d(sizes[i + 1], sizes[i], 2, 2) for i in range(depth)])
            self.up = nn.ModuleList([Double(2 * sizes[i], sizes[i]) for i in range(depth)])
            self.out = nn.Conv2d(width, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            target, skips = x, []
            for block in self.down:
                skips.append(block(x))
                x = F.max_pool2d(skips[-1], 2)
            x = self.middle(x)
            for index in reversed(range(len(self.up))):
                x = self.up[index](torch.cat([skips[index], self.lift[index](x)], dim=1))
            return F.mse_loss(self.out(x), target)

    with torch.device("meta"):
        model = UNet()
    return model, (torch.zeros(1, 3, 256, 256),), {}


def llama_405b() -> tuple[object, tuple[object, ...], dict[str, object]]:
    """Give the shape of the model of 405 billion parameters, and a fake batch of sixteen sequences."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with FakeTensorMode():
        ids = torch.zeros(16, 4096, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


def llama_shape(hidden: int, inner: int, layers: int, tokens: int, *, tied: bool = False) -> tuple[object, ...]:
    """Give a Llama of bfloat16 with a vocabulary of 128,256, and a fake batch of 64 sequences."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        use_cache=False,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with FakeTensorMode():
        ids = torch.zeros(64, tokens, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


def mixtral_tiny() -> tuple[object, ...]:
    """Give four tiny layers with four experts each."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_local_experts=4,
        use_cache=False,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    ids = torch.zeros(8, 32, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}


SHAPES: dict[str, tuple[Callable[[], tuple[object, ...]], int]] = {
    "Llama, 1 billion, tied": (lambda: llama_shape(2048, 8192, 16, 2048, tied=True), 8),
    "Llama, 70 billion": (lambda: llama_shape(8192, 28672, 80, 4096), 16),
    "Mixtral, four tiny layers": (mixtral_tiny, 4),
}

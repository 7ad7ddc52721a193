"""What people use: flex attention, encoders with padding, losses in tuples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxpipe


class Encoded(nn.Module):
    def __init__(self, norm=None, layers=3, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, norm=norm, enable_nested_tensor=True)
        self.out = nn.Linear(8, 2)

    def forward(self, x, pad):
        return self.out(self.encoder(x, src_key_padding_mask=pad).mean(1))


def padding(*lengths, size=5):
    return torch.arange(size) >= torch.tensor(lengths).unsqueeze(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("form", [lambda pad: pad, lambda pad: torch.zeros(pad.shape).masked_fill(pad, -torch.inf)])
@pytest.mark.parametrize("norm", [lambda: None, lambda: nn.LayerNorm(8)])
def test_an_encoder_leaves_out_what_is_padded_as_it_does_without_gradients(norm, form):
    torch.manual_seed(0)
    model, x = Encoded(norm()).eval(), torch.randn(4, 5, 8)
    pipe = fxpipe.compile(model, 2, (x, form(padding(5, 5, 3, 3))), microbatches=2).materialize(device="cpu")
    pipe.eval()
    for pad in (padding(5, 5, 3, 3), padding(5, 5, 5, 5), padding(1, 2, 3, 5)):
        with torch.no_grad():
            expected = model(x, form(pad))
        torch.testing.assert_close(pipe.infer(x, form(pad)), expected, rtol=1e-5, atol=1e-6)
    scattered = torch.tensor([[False, True, False, False, True]] * 4)  # not at the end: no fast path
    with torch.no_grad():
        torch.testing.assert_close(pipe.infer(x, form(scattered)), model(x, form(scattered)), rtol=1e-5, atol=1e-6)
    pipe.close()


def test_an_encoder_in_training_does_what_it_does_in_training():
    torch.manual_seed(0)
    model, x, pad = Encoded(), torch.randn(4, 5, 8), padding(5, 5, 3, 3)
    target = torch.randn(4, 2)
    options = {"loss_fn": F.mse_loss, "microbatches": 2}
    pipe = fxpipe.compile(model, 2, (x, pad), {"target": target}, **options).materialize(device="cpu")
    expected = F.mse_loss(model(x, pad), target).detach()
    torch.testing.assert_close(pipe.step(x, pad, target=target), expected, rtol=1e-5, atol=1e-6)
    pipe.close()


def causal(batch, head, query, key):
    return query >= key


def near(batch, head, query, key):
    return (query - key).abs() < 9


class Flexible(nn.Module):
    def __init__(self, mask, score=None):
        super().__init__()
        self.linear, self.mask, self.score = nn.Linear(16, 16), [mask], [score]

    def forward(self, x):
        q = self.linear(x)[:, None]
        q = q if x.shape[0] > 4 else q.detach()  # the CPU has no backward of it
        return x + flex_attention(q, q, q, block_mask=self.mask[0], score_mod=self.score[0])[:, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grain", ["block", "op"])
@pytest.mark.parametrize(
    ("mask", "score"),
    [(causal, None), (near, None), (None, lambda score, b, h, q, k: score + (q - k) * 0.01)],
)
def test_flex_attention_is_captured_and_run(mask, score, grain):
    torch.manual_seed(0)
    block_mask = create_block_mask(mask, None, None, 32, 32, device="cpu") if mask else None
    model, x = nn.Sequential(*(Flexible(block_mask, score) for _ in range(3))), torch.randn(4, 32, 16)
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "grain": grain}
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, **options).materialize(device="cpu")
    with torch.no_grad():
        expected = F.mse_loss(model(x), x)
        torch.testing.assert_close(pipe.infer(x), model(x))
    torch.testing.assert_close(pipe.step(x, target=x), expected, rtol=1e-5, atol=1e-6)
    pipe.close()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grain", ["block", "op"])
def test_flex_attention_meant_for_an_accelerator_is_planned_with_its_backward(grain):
    mask = create_block_mask(causal, None, None, 128, 128, device="cpu")
    x = torch.randn(16, 128, 16)
    model = nn.Sequential(*(Flexible(mask) for _ in range(3)))
    pipe = fxpipe.compile(model, 2, (x,), {"target": x}, loss_fn=F.mse_loss, microbatches=2, grain=grain)
    assert any("flex_attention" in op.name for counts in pipe.graph.counts for op in counts.ops)

"""Batches of ever new shapes: one graph with symbols for all that take its path, held against the plain model."""

import copy
import gc

import models
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
import fxpipe.variants

VOCABULARY = 64


def language(rows, length, padded):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        for row in range(rows):
            mask[row, length - 1 - row :], labels[row, length - 1 - row :] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Net(nn.Module):
    """Sizes that are halved and rounded up, and a path that large images take."""

    def __init__(self):
        super().__init__()
        steps = (1, 2, 1, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(3 if at == 0 else 4, 4, 3, step, 1) for at, step in enumerate(steps))
        self.head = nn.Linear(4, 5)

    def forward(self, x, labels):
        for block in self.blocks:
            x = F.relu(block(x))
        if x.shape[-1] > 4:
            x = x[..., : x.shape[-1] - 1] * 2
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


def images(rows, length, wide):
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(rows, 3, length, length + 2 * wide, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(5, (rows,), generator=generator)}


def built(name):
    torch.manual_seed(0)
    if name == "net":
        return Net().double(), images
    config = {
        "bert": ("BertConfig", "BertForMaskedLM"),
        "gpt2": ("GPT2Config", "GPT2LMHeadModel"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
    }[name]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 3, "n_embd": 16, "n_layer": 3, "n_head": 2}
    for drop in ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        sizes[drop] = 0.0
    sizes = {key: value for key, value in sizes.items() if name != "gpt2" or not key.startswith(("hidden", "num_"))}
    return models.huggingface(config[0], sizes, config[1])().double(), language


@pytest.mark.parametrize(("name", "most"), [("gpt2", 3), ("bert", 3), ("net", 8)])
def test_new_lengths_need_no_new_recording(name, most):
    """Each path is recorded twice, with numbers and with symbols: padded or not; square or not, small or not."""
    model, batch_of = built(name)
    plain = copy.deepcopy(model)
    with fxpipe.compile(model, 2, (), batch_of(4, 9, False), microbatches=2, schedule="GPipe") as pipe:
        pipe.materialize()
        for length in (12, 14, 7, 20, 13, 31, 8):
            for way in (False, True):
                batch = batch_of(4, length, way)
                pipe.zero_grad()
                plain.zero_grad()
                loss, wanted = pipe.step(**batch), plain(**batch)
                wanted = wanted if name == "net" else wanted.loss
                wanted.backward()
                torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6 if name == "gpt2" else 1e-12, atol=0)
                largest = max(float(each.grad.abs().max()) for each in plain.parameters())
                for fqn, parameter in pipe.named_parameters():
                    error = float((parameter.grad - plain.get_parameter(fqn).grad).abs().max())
                    assert error <= (1e-6 if name == "gpt2" else 1e-12) * largest, fqn
        assert pipe._trainer.variants.num_captures <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "net"])
def test_a_hundred_and_fifty_lengths_take_five_recordings_and_no_memory(name):
    """Each length padded once and once not; Hugging Face computes the losses of decoders in float32."""
    model, batch_of = built(name)
    resident = []
    with fxpipe.compile(model, 2, (), batch_of(4, 9, False), microbatches=2, schedule="GPipe") as pipe:
        pipe.materialize()
        for step in range(300):
            batch = batch_of(4, 8 + (step * 37) % 150, bool((step // 150 + step) % 2))
            pipe.zero_grad()
            with torch.no_grad():
                wanted = model(**batch)
            wanted = wanted if name == "net" else wanted.loss
            rtol = 1e-6 if name in ("gpt2", "llama") else 1e-12
            torch.testing.assert_close(pipe.step(**batch), wanted, rtol=rtol, atol=0)
            if step % 50 == 49:
                gc.collect()
                resident.append(psutil.Process().memory_info().rss)
        assert pipe._trainer.variants.num_captures <= 5
    assert max(resident[1:]) - resident[0] < 32 * 2**20, [size >> 20 for size in resident]


class Reading(nn.Module):
    """Numbers of sizes on all the ways that Python has; some of them nobody can follow."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, labels):
        length = x.shape[1]
        for block in self.blocks:
            x = torch.tanh(block(x))
        if self.kind == "arithmetic":
            x = x[:, length // 3 : length - 1].sum(1) / length + torch.arange(length).sum() % 7
        elif self.kind == "branch":
            x = x.sum(1) * (2 if length > 11 else 3) + (1 if length % 2 else 0)
        elif self.kind == "integer":
            x = x.sum(1) * (2 if isinstance(length, int) else 3)
        elif self.kind == "float":
            x = x.sum(1) / float(length) ** 0.5
        elif self.kind == "list":
            x = x.sum(1) * len([0] * length) + ["a"].count("b")
        elif self.kind == "loop":
            x = sum(x[:, at] * (at + 1) for at in range(length))
        elif self.kind == "text":
            x = x.sum(1) * (5 if str(length) == "11" else 4)
        elif self.kind == "values":
            x = x.sum(1) * torch.arange(length)[-1].item()
        elif self.kind == "caught":
            try:
                x = x.sum(1) * {7: 2}[length]
            except Exception:
                x = x.sum(1) * 3
        elif self.kind == "instance":
            x = x.sum(1) * (2 if isinstance(length, int) and length > 12 else 3)
        elif self.kind == "type":
            x = x.sum(1) * (2 if type(length) is int and length > 12 else 3)
        elif self.kind == "floored":
            x = x.sum(1) + length // 3.5
        elif self.kind == "counted":
            x = x.sum(1) * (2 if sum(1 for _ in x.transpose(0, 1)) > 12 else 3)
        elif self.kind == "classes":

            class Kind(type):
                pass

            class Own(metaclass=Kind):
                pass

            assert type(Own) is Kind
            assert (isinstance(Own, Kind), isinstance(x, Kind), Kind == type) == (True, False, False)  # noqa: E721
            self.kinds = type(Own).__name__
            x = x.sum(1) * (2 if length > 12 else 3)
        elif self.kind == "made":
            x = (x * torch.ones_like(x)[:, :, :1].cumsum(1)).mean(1) + x.new_full((length, 4), 0.5).sum(0)
        return F.mse_loss(x, labels)


@pytest.mark.parametrize(
    "kind",
    [
        *("arithmetic", "branch", "integer", "float", "list", "loop", "text", "values", "caught", "made"),
        *("instance", "type", "floored", "counted", "classes"),
    ],
)
def test_a_number_of_sizes_is_never_a_stale_one(kind):
    torch.manual_seed(0)
    model = Reading(kind).double()
    batches = [
        {"x": torch.randn(4, length, 4).double(), "labels": torch.randn(4, 4).double()}
        for length in (9, 10, 13, 11, 7, 12, 24, 8, 7, 11)
    ]
    with fxpipe.compile(model, 2, (), batches[0], microbatches=2, schedule="GPipe").materialize() as pipe:
        for batch in batches:
            torch.testing.assert_close(pipe.step(**batch), model(**batch).detach(), rtol=1e-12, atol=0)


def test_inference_takes_every_length_too():
    model, batch_of = built("bert")
    model.eval()
    with fxpipe.compile(model, 2, (), batch_of(4, 9, False), microbatches=2, schedule="GPipe").materialize() as pipe:
        pipe.eval()
        for length in (9, 12, 14, 7):
            batch = batch_of(4, length, False)
            batch.pop("labels")
            wanted = model(**batch).logits
            torch.testing.assert_close(pipe.infer(**batch).logits, wanted, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(pipe.infer(**batch, microbatches=2).logits, wanted, rtol=1e-12, atol=1e-14)


def test_microbatches_of_one_row_beside_others_take_every_length():
    """A size of 1 broadcasts and is no symbol's: such batches have graphs of their own, with symbols for lengths."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Conv1d(3, 3, 3, padding=1) for _ in range(2))
    model = nn.Sequential(*layers, nn.Tanh()).double()
    rows = (4, 2, 2, 6, 2, 4, 2, 2, 6)
    batches = [
        torch.randn(number, 3, length, dtype=torch.float64)
        for number, length in zip(rows, range(4, 22, 2), strict=True)
    ]
    options = {"loss_fn": F.mse_loss, "microbatches": 2, "schedule": "GPipe"}
    with fxpipe.compile(model, 2, (batches[0],), {"target": batches[0]}, **options).materialize() as pipe:
        for x in batches:
            torch.testing.assert_close(
                pipe.step(x, target=2 * x), F.mse_loss(model(x), 2 * x).detach(), rtol=1e-12, atol=0
            )
        assert (
            pipe._trainer.variants.num_captures <= 3
        )  # each kind with numbers, the first in compile, and with symbols


def test_no_tensor_of_a_past_batch_is_kept():
    import weakref

    model, batch_of = built("bert")
    with fxpipe.compile(model, 2, (), batch_of(4, 9, False), microbatches=2, schedule="GPipe").materialize() as pipe:
        gone = []
        for length in (9, 12, 14):
            batch = batch_of(4, length, True)
            gone += [weakref.ref(tensor.untyped_storage()) for tensor in batch.values()]
            pipe.step(**batch)
        del batch
        gc.collect()
        assert [each() for each in gone] == [None] * len(gone)

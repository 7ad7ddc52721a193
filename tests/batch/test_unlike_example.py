"""Batches that are not as the example was: inference tensors and modes, other dtypes, no values, other arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe

WORDS, WIDTH = 9, 6


class Tagger(nn.Module):
    """Tags words; what is hidden counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.tags = nn.Linear(WIDTH, 4)

    def forward(self, words, hidden=None, features=None, tags=None):
        x = self.words(words)
        if features is not None:
            x = x + features
        for block in self.blocks:
            x = x + block(x)
        scores = self.tags(x)
        if hidden is not None:
            scores = scores.masked_fill(~hidden[..., None], 0.0)
        return F.cross_entropy(scores.flatten(0, 1), tags.flatten()) if tags is not None else scores


def batch(**others):
    draw = torch.Generator().manual_seed(5)
    given = {
        "words": torch.randint(0, WORDS, (4, 3), generator=draw),
        "hidden": torch.rand(4, 3, generator=draw) > 0.3,
        "features": torch.randn(4, 3, WIDTH, generator=draw, dtype=torch.float64),
        "tags": torch.randint(0, 4, (4, 3), generator=draw),
    }
    return {**given, **others}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Tagger().double()


@pytest.fixture(scope="module")
def pipe(model):
    with fxpipe.compile(model, 2, (), batch(), microbatches=2).materialize(device="cpu") as pipe:
        yield pipe


def check_step(pipe, model, given):
    """Hold the gradients that are there, and the loss of a batch, against the model's."""
    model.zero_grad()
    loss = model(**given)
    loss.backward()
    step = pipe.step(**given)
    assert abs(step - loss) <= 1e-12 * loss
    for fqn, parameter in pipe.named_parameters():
        expected = model.get_parameter(fqn).grad
        assert (parameter.grad - expected).abs().max() <= 1e-12 * expected.abs().max(), fqn
    pipe.zero_grad()


def test_tensors_made_in_inference_mode_are_taken(pipe, model):
    with torch.inference_mode():
        made = {name: tensor.clone() for name, tensor in batch().items()}
    step = pipe.step(**made)
    check = {fqn: parameter.grad.clone() for fqn, parameter in pipe.named_parameters()}
    parts = [{name: tensor[part : part + 2] for name, tensor in made.items()} for part in (0, 2)]
    assert abs(pipe.step(microbatches=parts) - step) <= 1e-12 * step
    assert all(parameter.grad.allclose(2 * check[fqn]) for fqn, parameter in pipe.named_parameters())
    pipe.zero_grad()
    assert pipe.verify(**made)
    check_step(pipe, model, batch())


def test_calls_made_in_inference_mode_leave_gradients_and_can_be_trained_after(pipe, model):
    given = batch()
    with torch.inference_mode():
        outputs = pipe.infer(words=given["words"])
        assert abs(pipe.evaluate(**given) - model(**given)) <= 1e-12
        pipe.step(**given)
        made = {name: tensor + 0 for name, tensor in given.items() if name != "hidden"}
        assert pipe.infer(**made, hidden=given["hidden"]).dim() == 0
    assert torch.equal(outputs, model(given["words"]))
    assert all(parameter.grad is not None for parameter in pipe.parameters())
    pipe.zero_grad()
    check_step(pipe, model, given)


def test_a_model_is_compiled_in_inference_mode(model):
    with torch.inference_mode():
        pipe = fxpipe.compile(model, 2, (), batch(), microbatches=2).materialize(device="cpu")
    with pipe:
        check_step(pipe, model, batch())


@pytest.mark.parametrize("other", [{"words": torch.int32}, {"features": torch.float32}, {"features": torch.int64}])
def test_other_dtypes_that_the_model_takes_are_taken(pipe, model, other):
    check_step(pipe, model, batch(**{name: batch()[name].to(dtype) for name, dtype in other.items()}))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"hidden": torch.ones(4, 3)}, r"hidden is float32 \(bool in the example\)"),
        ({"tags": torch.zeros(4, 3, dtype=torch.int32)}, r"tags is int32 \(int64 in the example\)"),
        ({"words": torch.zeros(4, dtype=torch.int64)}, r"words has 1 dimensions \(2 in the example\)"),
        ({"words": None}, "words of the example is not here"),
        ({"tags": None}, "tags of the example is not here"),
        ({"hiden": torch.ones(4, 3)}, r"(?s)it takes words, hidden, features, tags; .*hiden \(hidden\?\)\n"),
        ({"words": torch.zeros(4, 3, dtype=torch.int64, device="meta")}, "words of the batch has no values"),
    ],
)
def test_what_the_model_does_not_take_is_told_beside_the_example(pipe, model, other, told):
    with pytest.raises(fxpipe.CaptureError, match=told):
        pipe.step(**batch(**other))
    check_step(pipe, model, batch())


def test_an_error_of_torch_while_it_runs_says_where(pipe):
    with pytest.raises(IndexError) as raised:
        pipe.step(**batch(words=torch.full((4, 3), WORDS)))
    assert raised.value.__notes__ == ["in stage 0, microbatch 0, layer words"]
    with pytest.raises(IndexError) as raised:
        pipe.infer(words=torch.full((4, 3), WORDS, dtype=torch.int32))
    notes = ["in stage 0, microbatch 0, layer words", "unlike the example that was compiled: words is int32"]
    assert [note.split(" (")[0] for note in raised.value.__notes__] == notes


def test_a_step_without_a_batch_is_refused(pipe):
    with pytest.raises(fxpipe.ScheduleError, match="step got no batch\n  pass one as in the example, which had words"):
        pipe.step()

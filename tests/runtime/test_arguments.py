"""What calls are given beside a batch is refused by name where it cannot be meant."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.runtime.build.stage import PartModule
from fxpipe.runtime.run import prepare
from fxpipe.runtime.run.optimizer import check_scaler

X, TARGET = torch.ones(4, 3), torch.zeros(4, 3)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def compiled(model=None, **options):
    model = model or nn.Sequential(Pair(), nn.Linear(3, 3))
    given = {"loss_fn": F.mse_loss, "microbatches": 2, "grain": "block", **options}
    return fxpipe.compile(model, 2, (X,), {"target": TARGET}, **given)


@pytest.fixture(scope="module")
def pipe():
    with compiled().materialize(device="cpu") as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda pipe: pipe.clip_grad_norm_("1"), fxpipe.ScheduleError, "max_norm='1' is not a number"),
        (lambda pipe: pipe.clip_grad_norm_(1.0, None), fxpipe.ScheduleError, "norm_type=None is not a number"),
        (lambda pipe: pipe.step(X, target=TARGET, scaler=2.0), fxpipe.ScheduleError, "scaler is a float\n  pass what"),
        (lambda pipe: pipe.infer(X, microbatches="2"), fxpipe.ScheduleError, "into '2' microbatches\n  use 1 to 4"),
        (lambda pipe: pipe.optimizer("adamw"), fxpipe.MaterializeError, "cls is 'adamw', which cannot be called"),
        (lambda pipe: pipe.optimizer(torch.optim.SGD, [{}]), fxpipe.MaterializeError, "groups is a list"),
        (lambda pipe: pipe.save("new", optimizer=pipe.parameters()), fxpipe.WeightsError, "has no param_groups"),
        (lambda pipe: pipe.load("new", scheduler=3), fxpipe.WeightsError, "scheduler is 3, which has no state_dict"),
        (lambda pipe: pipe.load_state_dict(None), fxpipe.WeightsError, "the state is a NoneType\n"),
        (
            lambda pipe: pipe.load_state_dict({k: v.to("meta") for k, v in pipe.state_dict().items()}),
            fxpipe.WeightsError,
            "0.first.weight has no values",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(pipe, call, error, told):
    with pytest.raises(error, match=told):
        call(pipe)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device": "meta"}, "device='meta' has no memory"),
        ({"device": "cpy"}, "device='cpy' cannot be used here"),
        ({"dtype": "float32"}, "dtype='float32' is no dtype of floating point"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is no dtype"),
    ],
)
def test_where_nothing_can_be_computed_nothing_is_built(given, told):
    with pytest.raises(fxpipe.MaterializeError, match=told):
        compiled().materialize(**given)


def test_what_is_no_mesh_is_refused():
    with pytest.raises(fxpipe.ScheduleError, match="mesh is a tuple\n  pass a DeviceMesh"):
        compiled(mesh=(2, 1))


def test_a_loss_scaler_of_one_rank_alone_is_refused_on_several():
    scaler = torch.amp.GradScaler("cpu")
    check_scaler(scaler, is_shared=False)
    with pytest.raises(fxpipe.ScheduleError, match="scaler is a GradScaler of this rank alone"):
        check_scaler(scaler, is_shared=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_optimiser_made_before_materialize_is_refused_as_it_steps(device):
    with torch.device(device):
        model = nn.Sequential(Pair(), nn.Linear(3, 3))
    early = torch.optim.Adam([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    with compiled(model).materialize(device="cpu", init="reset" if device == "meta" else None) as pipe:
        pipe.step(X, target=TARGET)
        with pytest.raises(fxpipe.MaterializeError, match=r"Adam steps with .* \(0.first.weight and others\)"):
            early.step()
        pipe.optimizer(torch.optim.Adam).step()


def test_an_optimiser_of_a_model_that_is_trained_beside_its_pipeline_steps():
    model = nn.Sequential(Pair(), nn.Linear(3, 3))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, copy.deepcopy(model))]
    with compiled(model).materialize(device="cpu"):
        F.mse_loss(model(X), TARGET).backward()
        before = model[1].bias.clone()
        for optimizer in optimizers:  # that of the copy has no gradients, and steps as ever
            optimizer.step()
        assert not torch.equal(model[1].bias, before)


def test_a_stage_that_computes_in_another_dtype_than_planned_is_told_how():
    def narrow(stage):
        stage.register_forward_hook(lambda stage, given, results: tuple(each.bfloat16() for each in results))

    told = pytest.raises(fxpipe.ScheduleError, match=r"MixedPrecisionPolicy .* needs output_dtype=torch\.float32")
    with compiled().materialize(device="cpu", parallelize=narrow) as pipe, told:
        pipe.step(X, target=TARGET)


def test_sharding_a_module_of_which_a_stage_runs_parts_is_refused(monkeypatch):
    class Sharded:
        pass

    def wrap(stage):
        for part in stage.modules():
            if isinstance(part, PartModule):
                part.__class__ = type("Sharded", (Sharded, PartModule), {})

    monkeypatch.setattr(prepare, "FSDPModule", Sharded)
    pipe = compiled(nn.Sequential(Pair(), nn.ReLU()), grain="op", cost="parameters")
    with pytest.raises(fxpipe.MaterializeError, match="wrapped 0, which a cut crosses: stage 0 runs parts of it"):
        pipe.materialize(device="cpu", parallelize=wrap)

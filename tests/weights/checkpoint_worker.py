"""One of four ranks: checkpoints that other pipelines resume from, directories of transformers, adapters, bad input."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import families
import launch
import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from safetensors.torch import load_file, save_file

import fxpipe
import fxpipe.materialize

RANKS = 4
FOLDER = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path()


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Run as outside torchrun: this rank has all stages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fxpipe.runtime.ranks.joining, "is_distributed", lambda: False)
        yield


def first() -> bool:
    return dist.get_rank() == 0


def batch() -> dict[str, Any]:
    given = models.street_batch()
    return {**given, "gain": given["gain"].float()}


def street(stages: int = 4, schedule: str = "1F1B", **options: Any) -> fxpipe.Pipeline:
    torch.manual_seed(0)
    given = {"ranks": 4, "seed": 7, **options}
    pipe = fxpipe.compile(
        models.Street(0.1), stages, (), batch(), loss_fn=models.token_loss, microbatches=12, schedule=schedule, **given
    )
    return pipe.materialize()


def trainer(pipe: fxpipe.Pipeline, kind: str = "AdamW") -> tuple[Any, Any]:
    """An optimiser with and without weight decay, the same two groups on every rank, and a scheduler."""
    named = dict(pipe.named_parameters())
    flat = [p for fqn, p in named.items() if fqn.endswith("bias") or "norm" in fqn]
    deep = [p for p in named.values() if not any(p is other for other in flat)]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = getattr(torch.optim, kind)(groups, lr=0.01)
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 7], gamma=0.5)


def train(pipe: fxpipe.Pipeline, optimizer: Any, scheduler: Any, steps: int = 5) -> list[torch.Tensor]:
    losses = []
    for _ in range(steps):
        pipe.zero_grad()
        losses.append(pipe.step(**batch()))
        optimizer.step()
        scheduler.step()
    return losses


def optimizer_state(pipe: fxpipe.Pipeline, optimizer: Any) -> dict[str, Any]:
    fqns = {id(p): fqn for fqn, p in pipe.named_parameters()}
    return {fqns[id(p)]: dict(state) for p, state in optimizer.state.items()}


def resumed_elsewhere() -> None:
    """Five steps, a save; the next five are the undisturbed run's on other numbers of stages and other schedules."""
    path = FOLDER / "street"
    with street() as pipe:
        optimizer, scheduler = trainer(pipe)
        train(pipe, optimizer, scheduler)
        pipe.save(path, optimizer=optimizer, scheduler=scheduler, extra={"epoch": 2, "seen": [1, 2.5, None]})
        saved = copy.deepcopy(optimizer_state(pipe, optimizer))
        weights = copy.deepcopy(pipe.state_dict())
        losses = train(pipe, optimizer, scheduler)
        final = pipe.state_dict(full=True)
    for schedule, stages, tolerance in (("1F1B", 4, 0.0), ("GPipe", 4, 0.0), ("Interleaved1F1B", 8, 1e-6)):
        with street(stages, schedule, seed=1) as pipe:
            optimizer, scheduler = trainer(pipe)
            extra = pipe.load(path, optimizer=optimizer, scheduler=scheduler)
            assert extra == {"epoch": 2, "seen": [1, 2.5, None]}
            if stages == 4:
                torch.testing.assert_close(optimizer_state(pipe, optimizer), saved, rtol=0, atol=0)
                torch.testing.assert_close(pipe.state_dict(), weights, rtol=0, atol=0)
            again = train(pipe, optimizer, scheduler)
            torch.testing.assert_close(again, losses, rtol=tolerance, atol=0)
            assert optimizer.param_groups[0]["lr"] == 0.01 / 4
            if tolerance == 0:
                torch.testing.assert_close(pipe.state_dict(full=True), final, rtol=0, atol=0)
    states: list[Any] = [None] * RANKS
    dist.all_gather_object(states, saved)
    whole = {fqn: state for part in states for fqn, state in part.items()}
    for stages in (1, 2, 3) if first() else ():
        with one_process(), street(stages, "GPipe", ranks=stages) as pipe:
            optimizer, scheduler = trainer(pipe)
            pipe.load(path, optimizer=optimizer, scheduler=scheduler)
            torch.testing.assert_close(optimizer_state(pipe, optimizer), whole, rtol=0, atol=0)
            again = train(pipe, optimizer, scheduler)
            torch.testing.assert_close(again, losses, rtol=1e-6, atol=0)
    dist.barrier()


def onto_a_mesh(sharded: bool) -> None:
    """Without dropout: two stages by two replicas go on where four stages stopped, and the other way round."""
    torch.set_default_dtype(torch.float64)
    path = FOLDER / f"mesh-{sharded}"
    given = models.street_batch()
    model = models.Street()

    def made(stages: int, batch: dict[str, Any], **options: Any) -> fxpipe.Pipeline:
        options = {"loss_fn": models.token_loss, "microbatches": 6, "schedule": "GPipe", **options}
        return fxpipe.compile(copy.deepcopy(model), stages, (), batch, **options)

    def optimizer_of(pipe: fxpipe.Pipeline) -> Any:
        return pipe.optimizer(
            torch.optim.AdamW, groups=lambda fqn, _: {"weight_decay": 0.0 if "bias" in fqn else 0.1}, lr=0.01
        )

    def steps(pipe: fxpipe.Pipeline, optimizer: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
        losses = []
        for _ in range(3):
            pipe.zero_grad()
            losses.append(pipe.step(**batch))
            optimizer.step()
        return losses

    with made(4, given, microbatches=12).materialize() as pipe:
        optimizer = optimizer_of(pipe)
        steps(pipe, optimizer, given)
        pipe.save(path / "before", optimizer=optimizer)
        losses = steps(pipe, optimizer, given)
    grid = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    row = grid.get_local_rank("dp")
    half = {name: value[row * 6 : (row + 1) * 6] for name, value in given.items()}

    def shard(stage: torch.nn.Module) -> None:
        torch.distributed.fsdp.fully_shard(stage, mesh=grid["dp"])

    with made(2, half, mesh=grid).materialize(parallelize=shard if sharded else None) as pipe:
        optimizer = optimizer_of(pipe)
        pipe.load(path / "before", optimizer=optimizer)
        assert sharded == any(hasattr(parameter, "device_mesh") for parameter in pipe.parameters())
        again = steps(pipe, optimizer, half)
        torch.testing.assert_close(again, losses, rtol=1e-6, atol=0)
        pipe.save(path / "after", optimizer=optimizer)
        wanted = {fqn: whole(tensor).clone() for fqn, tensor in pipe.named_parameters()}
        state = optimizer_state(pipe, optimizer)
        moments = {fqn: whole(held["exp_avg"]).clone() for fqn, held in state.items()}
    with made(4, given, microbatches=12).materialize() as pipe:
        optimizer = optimizer_of(pipe)
        pipe.load(path / "after", optimizer=optimizer)
        held = optimizer_state(pipe, optimizer)
        for fqn, tensor in pipe.named_parameters():
            if fqn in wanted:
                assert torch.equal(tensor, wanted[fqn]), fqn
                assert torch.equal(held[fqn]["exp_avg"], moments[fqn]), fqn
        steps(pipe, optimizer, given)


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def written_once() -> None:
    """Every rank writes one file; a tied parameter that two stages hold is in one of them; no pickle anywhere."""
    path = FOLDER / "street"
    manifest = json.loads((path / "fxpipe.json").read_text())
    files = sorted(file.name for file in path.iterdir())
    assert files == ["fxpipe.json", *(f"rank-{rank:05}.safetensors" for rank in range(RANKS))]
    held = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert len(held) == len(set(held)) == len(manifest["tensors"]) + len(manifest["state"])
    assert "embed.weight" in held
    assert "head.weight" not in held


def in_the_background() -> None:
    """What trains on meanwhile is not what is saved."""
    with street() as pipe:
        optimizer, scheduler = trainer(pipe, "SGD")
        train(pipe, optimizer, scheduler, 1)
        weights = copy.deepcopy(pipe.state_dict())
        futures = [pipe.save(FOLDER / "later-1", async_=True)]
        train(pipe, optimizer, scheduler, 2)
        futures.append(pipe.save(FOLDER / "later-2", async_=True))
        later = copy.deepcopy(pipe.state_dict())
        train(pipe, optimizer, scheduler, 1)
        for future in futures:
            future.result(60)
        for name, wanted in (("later-1", weights), ("later-2", later)):
            pipe.load(FOLDER / name)
            torch.testing.assert_close(pipe.state_dict(), wanted, rtol=0, atol=0)
        with pytest.raises(fxpipe.WeightsError, match="exists"):
            pipe.save(FOLDER / "later-1", async_=True)


def failed_in_the_background() -> None:
    """The error is raised once: by the future of whatever rank asks, else by the next call, on every rank."""
    import fxpipe.runtime.weights.saving as saving

    def failing(*_: object) -> None:
        raise OSError("the disk is gone")

    with street() as pipe, pytest.MonkeyPatch.context() as patch:
        pipe.save(FOLDER / "before")
        patch.setattr(saving, "write_manifest", failing)
        for asking in (range(RANKS), [2], []):
            future = pipe.save(FOLDER / "failed", async_=True)
            if dist.get_rank() in asking:
                with pytest.raises(Exception, match="the disk is gone"):
                    future.result(60)
            if not asking:
                with pytest.raises(Exception, match="the disk is gone"):
                    pipe.load(FOLDER / "before")
            pipe.load(FOLDER / "before")
        assert not (FOLDER / "failed").exists()


def newest_is_found() -> None:
    """Of a directory of checkpoints the newest whole one is taken; broken ones are refused by name."""
    parent = FOLDER / "runs"
    with street() as pipe:
        optimizer, scheduler = trainer(pipe, "SGD")
        for step in range(3):
            train(pipe, optimizer, scheduler, 1)
            pipe.save(parent / f"at-{step}")
            if step == 1:
                wanted = copy.deepcopy(pipe.state_dict())
        if first():
            file = parent / "at-2" / "rank-00002.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
            shutil.copytree(parent / "at-2", parent / "at-9")
            (parent / "at-9" / "fxpipe.json").unlink()
        dist.barrier()
        for name, match in (("at-2", "rank-00002.safetensors has"), ("at-9", "no fxpipe.json")):
            with pytest.raises(fxpipe.WeightsError, match=match):
                pipe.load(parent / name)
        pipe.load(parent)
        torch.testing.assert_close(pipe.state_dict(), wanted, rtol=0, atol=0)


def family(name: str) -> None:
    """A directory of transformers into four ranks and back, every bit."""
    known = families.FAMILIES[name]
    source, target = FOLDER / f"{name}-theirs", FOLDER / f"{name}-ours"
    model = known.build("cpu")
    if first():
        model.save_pretrained(source)
    dist.barrier()
    wanted = model.state_dict()
    with fxpipe.compile(known.build(), RANKS, (), known.batch(), microbatches=4) as pipe:
        pipe.materialize(init=source)
        for fqn, tensor in pipe.state_dict().items():
            assert torch.equal(tensor, wanted[fqn]), fqn
        assert torch.isfinite(pipe.step(**known.batch()))
        pipe.save_pretrained(target)
    if first():
        assert 1 < len(list(target.glob("model-*.safetensors"))) <= RANKS
        back = type(model).from_pretrained(target).state_dict()
        assert {fqn for fqn, tensor in wanted.items() if not torch.equal(tensor, back[fqn])} == set()
    dist.barrier()


def adapters() -> None:
    """Base weights from the plain model's directory, adapters as peft starts them; trained ones as peft reads them."""
    import peft

    known = families.FAMILIES["llama"]
    configuration = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    base = known.build("cpu")
    if first():
        base.save_pretrained(FOLDER / "base")
    dist.barrier()
    with fxpipe.compile(peft.get_peft_model(known.build(), configuration), RANKS, (), known.batch()) as pipe:
        pipe.materialize(init=FOLDER / "base")
        start = pipe.state_dict(full=True)
        plain = base.state_dict()
        if first():
            assert torch.equal(
                start["base_model.model.lm_head.modules_to_save.default.weight"], plain["lm_head.weight"]
            )
            for fqn, tensor in start.items():
                if "lora_B" in fqn:
                    assert not tensor.any(), fqn
                elif "lora_A" in fqn:
                    assert tensor.any(), fqn
                elif "q_proj.base_layer" in fqn:
                    name = fqn.removeprefix("base_model.model.").replace(".base_layer", "")
                    assert torch.equal(tensor, plain[name]), fqn
        pipe.step(**known.batch())
        trained = [p for p in pipe.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD([{"params": trained}], lr=0.5) if trained else None
        if optimizer is not None:
            optimizer.step()
        pipe.save(FOLDER / "adapter", only="trainable")
        pipe.save(FOLDER / "lora")
        wanted = pipe.state_dict(full=True)
        own = copy.deepcopy(pipe.state_dict())
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.add_(1)
        pipe.load(FOLDER / "lora")
        torch.testing.assert_close(pipe.state_dict(), own, rtol=0, atol=0)
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        pipe.load(FOLDER / "adapter")
        torch.testing.assert_close(pipe.state_dict(), own, rtol=0, atol=0)
    if first():
        files = sorted(file.name for file in (FOLDER / "adapter").iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors"]
        back = peft.PeftModel.from_pretrained(base, FOLDER / "adapter").state_dict()
        assert set(back) == set(wanted)
        assert {fqn for fqn, tensor in wanted.items() if not torch.equal(tensor, back[fqn])} == set()
    dist.barrier()


def gpt2() -> tuple[fxpipe.Pipeline, dict[str, torch.Tensor]]:
    known = families.FAMILIES["gpt2"]
    pipe = fxpipe.compile(known.build(), RANKS, (), known.batch(), microbatches=4).materialize(init="huggingface")
    return pipe, copy.deepcopy(pipe.state_dict())


def bad_input() -> None:
    """One clear error each, on every rank, and nothing was changed."""
    source = FOLDER / "gpt2-good"
    broken = FOLDER / "broken"
    pipe, before = gpt2()
    with pipe:
        if first():
            model = families.FAMILIES["gpt2"].build("cpu")
            model.save_pretrained(source, max_shard_size="4KB")
            model.save_pretrained(FOLDER / "gpt2-one")
            broken.mkdir()
            for name, spoil in SPOILED.items():
                shutil.copytree(source, broken / name)
                spoil(broken / name)
        dist.barrier()
        for name, (match, options) in COMPLAINTS.items():
            with pytest.raises(fxpipe.WeightsError, match=match) as caught:
                pipe.load(broken / name, **options)
            said: list[str] = [""] * RANKS
            dist.all_gather_object(said, str(caught.value))
            assert len(set(said)) == 1, (name, said)
            torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(fxpipe.WeightsError, match=r"is a checkpoint of Street, not of GPT2LMHeadModel"):
            pipe.load(FOLDER / "street")
        with pytest.raises(fxpipe.WeightsError, match="there is no"):
            pipe.load(FOLDER / "nowhere")
        with pytest.raises(fxpipe.WeightsError, match="street exists"):
            pipe.save(FOLDER / "street")
        with pytest.raises(fxpipe.WeightsError, match=r"extra\['model'\] is a .*Linear, which JSON cannot hold"):
            pipe.save(FOLDER / "no", extra={"model": torch.nn.Linear(1, 1)})
        noted = {"epoch": 2, "seen": [1, 5 if dist.get_rank() == 2 else 4]}
        with pytest.raises(fxpipe.WeightsError, match=r"extra\['seen'\]\[1\] .*: rank 0 has 4, rank 2 has 5"):
            pipe.save(FOLDER / "no", extra=noted)
        assert not (FOLDER / "no").exists()
        pipe.save(FOLDER / "noted", extra=noted if dist.get_rank() == 2 else None)
        assert pipe.load(FOLDER / "noted") == {"epoch": 2, "seen": [1, 5]}
        torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)
        error = pytest.raises(KeyError if first() else fxpipe.RankError, match=r"rank 0 failed.*KeyError|^'")
        with error:
            pipe.load(FOLDER / "gpt2-one", rename=lambda name: {}[name] if first() else name)
        with pytest.raises(fxpipe.PlanError, match="where to save differs between ranks"):
            pipe.save(FOLDER / f"apart-{first()}")
        assert not list(FOLDER.glob("*apart*"))
        with pytest.raises(fxpipe.WeightsError, match=r"^rank 0: .*street exists"):
            pipe.save(FOLDER / ("street" if first() else "no"))
        with pytest.raises(fxpipe.PlanError, match="the path to load differs between ranks"):
            pipe.load(FOLDER / ("gpt2-one" if first() else "gpt2-good"))
        optimizer, _ = trainer(pipe)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3 if dist.get_rank() == 2 else 2)
        with pytest.raises(fxpipe.WeightsError, match=r"scheduler\S*step_size\S* .*: rank 0 has 2, rank 2 has 3"):
            pipe.save(FOLDER / "no", optimizer=optimizer, scheduler=scheduler)
        assert not list(FOLDER.glob("*no"))
        torch.testing.assert_close(pipe.state_dict(), before, rtol=0, atol=0)
        pipe.load(FOLDER / "gpt2-one", rename=lambda name: name)


def index_of(path: pathlib.Path) -> pathlib.Path:
    return path / "model.safetensors.index.json"


def remapped(path: pathlib.Path, file: str) -> None:
    index = json.loads(index_of(path).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = file
    index_of(path).write_text(json.dumps(index))


def changed(path: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the first file, and the index with them."""
    file = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    index = json.loads(index_of(path).read_text())
    weight_map = {name: held for name, held in index["weight_map"].items() if held != file.name}
    index_of(path).write_text(json.dumps({"weight_map": {**weight_map, **dict.fromkeys(tensors, file.name)}}))


def cut(path: pathlib.Path) -> None:
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-3])


def only_pickles(path: pathlib.Path) -> None:
    for file in path.iterdir():
        file.unlink()
    torch.save({"weight": torch.zeros(1)}, path / "pytorch_model.bin")


def disguised_pickle(path: pathlib.Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    torch.save({"weight": torch.zeros(1)}, file)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    tensors[name] = tensors[name].T.contiguous().flatten()


def narrowed(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()


def added(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.h.9.ln_1.weight"] = torch.ones(8)


def left_out(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


SPOILED: dict[str, Callable[[pathlib.Path], None]] = {
    "missing-shard": lambda path: sorted(path.glob("*.safetensors"))[2].unlink(),
    "truncated": cut,
    "index-absent": lambda path: remapped(path, "model-00099-of-00099.safetensors"),
    "index-astray": lambda path: remapped(path, sorted(path.glob("*.safetensors"))[-1].name),
    "outside": lambda path: remapped(path, "../outside.safetensors"),
    "shape": lambda path: changed(path, reshaped),
    "dtype": lambda path: changed(path, narrowed),
    "unexpected": lambda path: changed(path, added),
    "missing": lambda path: changed(path, left_out),
    "pickle": only_pickles,
    "disguised": disguised_pickle,
    "nonsense": lambda path: index_of(path).write_text("{"),
}
COMPLAINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "missing-shard": (r"lacks 1 of the \d+ files its index names: model-00003", {}),
    "truncated": (r"model-00002-of-\d+\.safetensors is no whole safetensors file", {}),
    "index-absent": (r"files its index names: model-00099-of-00099", {}),
    "index-astray": (r"which does not hold it", {}),
    "outside": (r"names \.\./outside\.safetensors, outside of its directory", {}),
    "shape": (r"has shape \[\d+\], the model's has \[\d+, \d+\]", {"dtype": "cast"}),
    "dtype": (r"has dtype bfloat16, the model's has float32", {}),
    "unexpected": (r"1 unexpected: transformer\.h\.9\.ln_1\.weight", {}),
    "missing": (r"1 missing: transformer\.", {}),
    "pickle": (r"holds pickles only \(pytorch_model\.bin\)", {}),
    "disguised": (r"holds a pickle", {}),
    "nonsense": (r"is no index of safetensors files", {}),
}


def no_space_left() -> None:
    """A file that cannot grow: an error on every rank, and no directory; then it works."""
    import resource

    import fxpipe.runtime.weights.target as target

    with street() as pipe:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        try:
            with pytest.raises(fxpipe.WeightsError, match=r"^rank 2: cannot write"):
                pipe.save(FOLDER / "full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not (FOLDER / "full").exists()
        assert not (FOLDER / ".full.part").exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
            with pytest.raises(fxpipe.WeightsError, match="has room for 5 bytes"):
                pipe.save(FOLDER / "full")
        pipe.save(FOLDER / "full")
        pipe.load(FOLDER / "full")


def cases() -> dict[str, Callable[[], None]]:
    bind = functools.partial
    return {
        "resume": resumed_elsewhere,
        "once": written_once,
        **{f"mesh-{sharded}": bind(onto_a_mesh, sharded) for sharded in (False, True)},
        "background": in_the_background,
        "background-failed": failed_in_the_background,
        "newest": newest_is_found,
        **{f"family-{name}": bind(family, name) for name in ("t5", "mixtral")},
        "adapters": adapters,
        "bad-input": bad_input,
        "no-space": no_space_left,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    launch.run_cases({name: case for name, case in cases().items() if not sys.argv[2:] or name in sys.argv[2:]})
    dist.destroy_process_group()

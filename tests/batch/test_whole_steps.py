"""Ready-split microbatches and random trees of arguments through a whole step: the batch's loss, or an error."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpipe


@dataclasses.dataclass
class Held:
    """A container of the user's."""

    inside: Any
    other: int = 3


class Summing(nn.Module):
    """Blocks over samples, and what each further tensor says of a sample, or of all."""

    def __init__(self, dims: dict[str, int | None]) -> None:
        super().__init__()
        self.blocks, self.dims = nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), dims

    def forward(self, x: torch.Tensor, tree: Any = None) -> torch.Tensor:
        x = x.movedim(self.dims["x"] or 0, 0)
        for name, tensor in leaves(tree, "tree"):
            dim = self.dims[name]
            x = x + (
                tensor.cos().mean() if dim is None else tensor.movedim(dim, 0).reshape(len(x), -1).sin().sum(1)[:, None]
            )
        for block in self.blocks:
            x = block(x).tanh()
        return x


def leaves(tree: Any, path: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(path, tree)]
    if isinstance(tree, Held):
        return leaves(tree.inside, f"{path}.inside")
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [each for key, item in items for each in leaves(item, f"{path}.{key}")]


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, dict[str, int | None], torch.Tensor, Any, torch.Tensor]:
    samples, number = draw(st.sampled_from([(2, 2), (4, 2), (4, 4), (6, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dims: dict[str, int | None] = {}

    def tensor(name: str, dim: int | None, rank: int, last: int | None = None) -> torch.Tensor:
        sizes = [draw(st.integers(1, 5)) for _ in range(rank)]
        if dim is not None:
            sizes[dim] = samples
        if last is not None:
            sizes[1 - (dim or 0)] = last
        dims[name] = dim
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def tree(path: str, depth: int) -> Any:
        kind = draw(st.sampled_from(["tensor", "tensor", "list", "dict", "held"] if depth else ["tensor"]))
        if kind == "tensor":
            rank = draw(st.integers(1, 3))
            return tensor(path, draw(st.sampled_from([None, *range(rank)])), rank)
        if kind == "held":
            return Held(tree(f"{path}.inside", depth - 1))
        names = ["0", "1"][: draw(st.integers(1, 2))] if kind == "list" else ["a", "b"]
        parts = {name: tree(f"{path}.{name}", depth - 1) for name in names}
        return parts if kind == "dict" else list(parts.values())

    x = tensor("x", draw(st.sampled_from([0, 1])), 2, last=3)
    rest = tree("tree", 2)
    target = tensor("target", draw(st.sampled_from([0, 1])), 2, last=3)
    return samples, number, dims, x, rest, target


def check(batch: tuple[int, int, dict[str, int | None], torch.Tensor, Any, torch.Tensor]) -> None:
    _, number, dims, x, tree, target = batch
    torch.manual_seed(0)
    model = Summing(dims).double()
    plain = copy.deepcopy(model)
    across = dims["target"] or 0

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, target.movedim(across, 0))

    said = {name: dim for name, dim in dims.items() if dim != 0}
    before = copy.deepcopy((x, tree, target))
    pipe = fxpipe.compile(
        model, 2, (x, tree), {"target": target}, loss_fn=loss_fn, microbatches=number, schedule="GPipe",
        grain="block", batch_dims=said,
    )  # fmt: skip
    with pipe.materialize(device="cpu"):
        wanted = loss_fn(plain(x, tree), target)
        wanted.backward()
        torch.testing.assert_close(pipe.step(x, tree, target=target), wanted.detach(), rtol=1e-12, atol=1e-14)
        own = dict(plain.named_parameters())
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-11, atol=1e-13)
    for (_, one), (_, other) in zip(leaves(before, ""), leaves((x, tree, target), ""), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=15)
@given(batches())
def test_samples_in_any_dimension_of_any_tree(batch: Any) -> None:
    check(batch)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
@settings(max_examples=100)  # `tox -e fuzz` tries twenty times as many
@given(batches())
def test_two_thousand_trees_give_the_loss_of_the_whole_batch(batch: Any) -> None:
    check(batch)


X, Z = (torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


class Pair(nn.Module):
    """A loss of two inputs that need not have as many samples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x.mean() + z.mean()


def made(example: int = 8, **options: Any) -> tuple[Pair, fxpipe.Pipeline]:
    torch.manual_seed(0)
    model = Pair().double()
    options = {"microbatches": 2, "schedule": "GPipe", "loss_fn": lambda output: output, **options}
    return model, fxpipe.compile(model, 2, (X, Z[:example]), **options).materialize(device="cpu")


@pytest.mark.parametrize("rows", [(2, 6), (6, 2), (4, 4), (1, 7)])
def test_ready_split_parts_count_their_samples(rows: tuple[int, int]) -> None:
    model, pipe = made()
    with pipe:
        parts = [((X[: rows[0]], Z[: rows[0]]), {}), ((X[rows[0] :], Z[rows[0] :]), {})]
        torch.testing.assert_close(pipe.step(microbatches=parts), model(X, Z).detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cuts", [(6, 2), (3, 4), (1, 7)])
def test_ready_split_parts_of_other_samples_are_refused(cuts: tuple[int, int]) -> None:
    _, pipe = made()
    with pipe:
        one, other = cuts
        parts = [((X[:one], Z[:other]), {}), ((X[one:], Z[other:]), {})]
        with pytest.raises(fxpipe.ScheduleError, match=rf"microbatch 0 has {one} samples, but holds z of shape"):
            pipe.step(microbatches=parts)


def test_what_counts_no_samples_that_are_known_weighs_no_microbatch() -> None:
    model, pipe = made(5, microbatches=1)
    with pipe:
        torch.testing.assert_close(pipe.step(X, Z[:5]), model(X, Z[:5]).detach(), rtol=1e-12, atol=0)
        parts = [((X[:6], Z[:2]), {}), ((X[6:], Z[2:5]), {})]
        with pytest.raises(fxpipe.CaptureError, match="which dimension of z counts samples is not known"):
            pipe.step(microbatches=parts)


@pytest.mark.parametrize("dims", [{"z": None}, {"z": 0}])
def test_what_the_user_says_of_it_counts(dims: dict[str, int | None]) -> None:
    model, pipe = made(batch_dims=dims)
    with pipe:
        cut = Z if dims["z"] is None else Z[:6]
        rest = Z if dims["z"] is None else Z[6:]
        parts = [((X[:6], cut), {}), ((X[6:], rest), {})]
        torch.testing.assert_close(pipe.step(microbatches=parts), model(X, Z).detach(), rtol=1e-12, atol=0)


class Reading(Pair):
    """Inference reads a weight that training does not."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Any:
        loss = super().forward(x, z)
        return loss if torch.is_grad_enabled() else {"loss": loss, "weight": self.blocks[2].weight * 2}


def test_a_weight_that_only_inference_reads_is_read_where_it_is() -> None:
    torch.manual_seed(0)
    model = Reading().double()
    pipe = fxpipe.compile(model, 3, (X, Z), microbatches=4, grain="block")
    with pipe.materialize(device="cpu"):
        torch.testing.assert_close(pipe.infer(X, Z)["weight"], model.blocks[2].weight * 2)

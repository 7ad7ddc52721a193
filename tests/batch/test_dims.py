"""Where samples lie: what the user says, what the example showed, else dimension 0; said in the report, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import fxpipe
from fxpipe.batch.dims import BatchDims
from fxpipe.batch.merge import merge_outputs
from fxpipe.batch.split import check_ready_split, split_batch
from fxpipe.capture.capture import Capture

leaves = st.tuples(st.integers(0, 2), st.integers(1, 3), st.booleans())


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, int, Any, dict[str, int | None], list[tuple[str, torch.Tensor, int | None]]]:
    """A batch whose tensors have their samples in any dimension, or none, and what is said of them."""
    rows, parts = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    size = rows * parts
    said: dict[str, int | None] = {}
    known: list[tuple[str, torch.Tensor, int | None]] = []
    kwargs: dict[str, Any] = {}
    for place, (dim, width, is_split) in enumerate(draw(st.lists(leaves, min_size=1, max_size=4))):
        shape = [width] * 3
        if is_split:
            shape[dim] = size
        tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
        name = f"x{place}"
        if draw(st.booleans()):
            kwargs[name], path = {"inner": [tensor]}, f"{name}.inner.0"
        else:
            kwargs[name], path = tensor, name
        said[path if draw(st.booleans()) else name] = dim if is_split else None
        known.append((name, tensor, dim if is_split else None))
    return size, parts, kwargs, said, known


def tensor_of(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value["inner"][0]


@settings(max_examples=60)
@given(trees())
def test_every_tensor_is_cut_where_the_user_says(drawn: Any) -> None:
    size, parts, kwargs, said, known = drawn
    dims = BatchDims.of((), said)
    if all(dim is None for _, _, dim in known):
        return
    split = split_batch((), kwargs, num_microbatches=parts, dims=dims)
    assert check_ready_split(split, dims) == (size // parts,) * parts
    for name, tensor, dim in known:
        pieces = [tensor_of(part[name]) for _, part, _ in split]
        if dim is None:
            assert all(torch.equal(piece, tensor) for piece in pieces)
        else:
            assert all(torch.equal(*pair) for pair in zip(pieces, tensor.chunk(parts, dim), strict=True))


def test_the_longest_path_counts() -> None:
    dims = BatchDims.of(("batch",), {"batch": 0, "batch.table": None})
    first, _ = split_batch(({"x": torch.zeros(4, 2), "table": torch.zeros(4, 3)},), {}, num_microbatches=2, dims=dims)
    assert first[0][0]["x"].shape == (2, 2)
    assert first[0][0]["table"].shape == (4, 3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"y": 0}, r"batch_dims names y, which the example does not have\n  its inputs are x, target"),
        ({"x": 3}, r"x of shape \[4, 6\], which has no dimension 3"),
        ({"x": 1, "target": 0}, r"target of shape \[4, 6\] along dimension 0"),
        ({"x": "first"}, r"batch_dims says 'first' for 'x'"),
        ([0], "batch_dims is a list"),
    ],
)
def test_what_cannot_be_is_refused(said: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.zeros(4, 6)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    with pytest.raises(fxpipe.ScheduleError, match=message):
        fxpipe.compile(Named(), 2, (x,), {"target": x}, loss_fn=nn.functional.mse_loss, microbatches=2, batch_dims=said)


def test_errors_about_shapes_name_the_way_out() -> None:
    with pytest.raises(fxpipe.ScheduleError, match=r"cannot split mask of shape \[5\].*\n.*batch_dims="):
        split_batch((torch.zeros(4),), {"mask": torch.zeros(5)}, num_microbatches=2)


@pytest.mark.parametrize("kind", ["packed", "nested"])
def test_ragged_inputs_are_refused_by_name(kind: str) -> None:
    parts = [torch.zeros(2, 3), torch.zeros(1, 3)]
    ragged = pack_sequence(parts) if kind == "packed" else torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(fxpipe.ScheduleError, match=r"cannot split text, a (PackedSequence|nested tensor)"):
        split_batch((), {"text": ragged, "y": torch.zeros(2)}, num_microbatches=2)


def test_ready_split_microbatches_count_what_the_example_split_first() -> None:
    dims = BatchDims(("ids", "table"))
    example = ((torch.zeros(8, 5), torch.zeros(1, 6)), {}, torch.zeros(8))
    learned = dims.learned(dims.layout(example))
    part = ((), {"table": torch.zeros(1, 6), "ids": torch.zeros(3, 5)}, torch.zeros(3))
    assert check_ready_split([part], learned) == (3,)


def report(x: torch.Tensor, **options: Any) -> str:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    pipe = fxpipe.compile(Named(), 2, (x,), microbatches=4, **options)
    return next(line for line in str(pipe).splitlines() if line.startswith("inputs"))


def test_the_report_says_what_was_taken_where_it_could_be_something_else() -> None:
    assert report(torch.zeros(8, 4, 6)) == "inputs  x float32[2, 4, 6] split along 0"
    assert report(torch.zeros(8, 4, 6), batch_dims={"x": 1}) == "inputs  x float32[8, 1, 6] split along 1"
    assert report(torch.zeros(8, 3, 6)) == "inputs  x float32[2, 3, 6]"


class Turned(nn.Module):
    """Returns its samples in the second dimension, rows of tokens, and a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.layers(x)
        return {"turned": y.transpose(0, 1), "rows": y.flatten(0, 1), "size": torch.tensor(x.shape[1])}


@pytest.mark.parametrize("number", [1, 2, 4])
def test_infer_joins_outputs_along_their_samples(number: int) -> None:
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(8, 4, 6)
    pipe = fxpipe.compile(model, 2, (x,), schedule="GPipe").materialize(device="cpu")
    found, wanted = pipe.infer(x, microbatches=number), model(x)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)


def test_outputs_without_samples_that_differ_are_refused() -> None:
    with pytest.raises(fxpipe.ScheduleError, match=r"output\['norm'\].*differs between the 2 microbatches"):
        merge_outputs([{"norm": torch.ones(3)}, {"norm": torch.zeros(3)}], (3, 3), {"output['norm']": None})


class Counting(nn.Linear):
    """Says beside its output how many samples and features there are."""

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"y": super().forward(x), "rows": x.shape[0], "size": (x.shape[1], "wide")}


def test_numbers_that_a_model_returns_are_those_of_the_batch() -> None:
    model = Counting(6, 2)
    with fxpipe.compile(model, 1, (torch.zeros(4, 6),), schedule="GPipe").materialize(device="cpu") as pipe:
        for rows in (4, 6, 8, 12):
            found = pipe.infer(torch.randn(rows, 6))
            assert (type(found["rows"]), found["rows"], found["size"]) == (int, rows, (6, "wide"))
        with pytest.raises(fxpipe.ScheduleError, match=r"output\['rows'\] is 6 for 6 samples and 12 for 12"):
            pipe.infer(torch.randn(12, 6), microbatches=2)


def test_the_outputs_dimensions_of_samples_are_found_once_for_each_kind_of_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 2)
    found: list[int] = []
    real = Capture.output_dims
    monkeypatch.setattr(Capture, "output_dims", lambda *given: found.append(1) or real(*given))
    with fxpipe.compile(model, 1, (torch.zeros(4, 3),), {}, schedule="GPipe") as pipe:
        pipe.materialize(device="cpu")
        for rows, number, times in ((4, 2, 1), (4, 2, 1), (8, 4, 1), (8, 2, 2), (4, 2, 2)):
            x = torch.randn(rows, 3)
            torch.testing.assert_close(pipe.infer(x, microbatches=number), model(x))
            assert len(found) == times

"""A batch into microbatches and back."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fxpipe
from fxpipe.batch.dims import BatchDims
from fxpipe.batch.inputs import name_inputs
from fxpipe.batch.merge import merge_outputs
from fxpipe.batch.moving import OnDevice
from fxpipe.batch.split import batch_size_of, check_ready_split, split_batch
from fxpipe.batch.weights import loss_weights
from fxpipe.errors import ScheduleError


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Sample:
    ids: Any
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class FrozenSample:
    ids: Any


def nested(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.tuples(inner, inner).map(lambda pair: Pair(*pair)),
            st.builds(Sample, inner),
            st.builds(FrozenSample, inner),
        ),
        max_leaves=6,
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, int, tuple[Any, ...], dict[str, Any]]:
    rows, parts = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    size = rows * parts

    def tensor(width: int) -> torch.Tensor:
        return torch.arange(size * width).reshape(size, width)

    leaf = st.one_of(
        st.integers(0, 3).map(tensor),
        st.just(torch.arange(size)),
        st.just(torch.tensor(3.0)),
        st.just(torch.ones(1, 5)),
        st.none(),
        st.integers(0, 9),
        st.text("ab", max_size=2),
    )
    first = (torch.arange(size),)
    return (
        parts,
        size,
        first + tuple(draw(st.lists(nested(leaf), max_size=2))),
        draw(st.dictionaries(st.sampled_from(["x", "y"]), nested(leaf), max_size=2)),
    )


def expected(value: Any, size: int, start: int, rows: int) -> Any:
    """Judge by another way: slicing, one container type after the other."""
    if isinstance(value, torch.Tensor):
        return value[start : start + rows] if value.dim() and len(value) == size else value
    if isinstance(value, Pair):
        return Pair(expected(value.left, size, start, rows), expected(value.right, size, start, rows))
    if isinstance(value, Sample | FrozenSample):
        return dataclasses.replace(value, ids=expected(value.ids, size, start, rows))
    if isinstance(value, dict):
        return {key: expected(item, size, start, rows) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(expected(item, size, start, rows) for item in value)
    return value


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, Sample | FrozenSample):
        return type(left) is type(right) and same(left.ids, right.ids)
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@settings(deadline=None)
@given(batches())
def test_every_microbatch_holds_its_rows_of_each_batch_tensor(
    batch: tuple[int, int, tuple[Any, ...], dict[str, Any]],
) -> None:
    parts, size, args, kwargs = batch
    rows = size // parts
    split = split_batch(args, kwargs, args[0], num_microbatches=parts)
    assert len(split) == parts
    for index, (part_args, part_kwargs, target) in enumerate(split):
        assert same(part_args, expected(args, size, index * rows, rows))
        assert same(part_kwargs, expected(kwargs, size, index * rows, rows))
        assert torch.equal(target, args[0][index * rows : (index + 1) * rows])


@settings(deadline=None)
@given(batches())
def test_merging_what_was_split_gives_the_batch_back(batch: tuple[int, int, tuple[Any, ...], dict[str, Any]]) -> None:
    parts, size, args, kwargs = batch
    assume(size > parts or parts == 1)  # one row per microbatch cannot be told from a repeated tensor of one row
    split = split_batch(args, kwargs, num_microbatches=parts)
    merged = merge_outputs([(a, k) for a, k, _ in split], [size // parts] * parts)
    assert same(merged, (args, kwargs))


def test_microbatches_are_views_of_the_batch() -> None:
    ids = torch.arange(12).reshape(6, 2)
    _, second, _ = split_batch((ids,), {}, num_microbatches=3)
    assert second[0][0].data_ptr() == ids[2:].data_ptr()
    assert second[0][0].untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()


def test_a_tensor_of_another_length_is_refused_by_name() -> None:
    batch = {"nested": [torch.zeros(4), {"deep": torch.zeros(3, 2)}]}
    message = r"cannot split batch\['nested'\]\[1\]\['deep'\] of shape \[3, 2\].*4 samples.*\n.*step\(microbatches="
    with pytest.raises(ScheduleError, match=message):
        split_batch((torch.zeros(4),), {"batch": batch}, num_microbatches=2)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ScheduleError, match=r"args\[1\] of shape \[3\]; target of shape \[5\]"):
        split_batch((torch.zeros(4), torch.zeros(3)), {}, torch.zeros(5), num_microbatches=2)


def test_a_numpy_array_is_refused_rather_than_repeated() -> None:
    with pytest.raises(ScheduleError, match="weights, a numpy array"):
        split_batch((torch.zeros(4),), {"weights": numpy.ones(4)}, num_microbatches=2)


def test_a_batch_that_does_not_divide_names_the_numbers() -> None:
    with pytest.raises(
        ScheduleError, match=r"batch of 5 is not divisible into 2 microbatches\n.*microbatches=\[\.\.\.\]"
    ):
        split_batch((torch.zeros(5),), {}, num_microbatches=2)


def test_a_hugging_face_output_keeps_items_and_attributes_alike() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    parts = [outputs.CausalLMOutput(logits=torch.full((2, 3), float(i))) for i in range(2)]
    merged = merge_outputs(parts, (2, 2))
    assert merged.logits.shape == (4, 3)
    assert merged["logits"] is merged.logits
    assert parts[0].logits.shape == (2, 3)


def test_rows_per_token_are_concatenated_too() -> None:
    router = [torch.randn(rows * 5, 4) for rows in (3, 1)]
    assert torch.equal(merge_outputs(router, (3, 1)), torch.cat(router))


def test_a_later_batch_dimension_is_found_when_it_is_the_only_one() -> None:
    states = [torch.randn(2, rows, 4) for rows in (3, 1)]
    assert torch.equal(merge_outputs(states, (3, 1)), torch.cat(states, dim=1))


def test_a_mean_that_differs_is_refused_not_averaged() -> None:
    with pytest.raises(ScheduleError, match=r"output\['loss'\] of shape \[\] has no batch dimension and differs"):
        merge_outputs([{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)}], (2, 2))


def test_a_value_equal_in_all_microbatches_is_given_once() -> None:
    merged = merge_outputs([(torch.tensor(4.6), None, "a")] * 3, (2, 2, 2))
    assert merged[0].shape == ()
    assert merged[1:] == (None, "a")


def test_different_structures_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"another structure.*output\['b'\]"):
        merge_outputs([{"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)}], (1, 1))


def test_ready_split_microbatches_give_their_sizes() -> None:
    sizes = (3, 1, 4, 2)
    assert check_ready_split([((), {"x": torch.zeros(n, 7 - n)}, None) for n in sizes]) == sizes


def test_no_microbatches_and_empty_ones_are_refused() -> None:
    with pytest.raises(ScheduleError, match="no microbatches"):
        check_ready_split([])
    with pytest.raises(ScheduleError, match="microbatch 1 has no samples"):
        check_ready_split([((torch.zeros(2),), {}, None), ((torch.zeros(0),), {}, None)])


def test_a_tensor_without_dimensions_does_not_give_the_batch_size() -> None:
    assert batch_size_of((torch.tensor(3.0), [torch.zeros(6, 2)]), {}) == 6


@pytest.mark.parametrize("weight", [float("nan"), -1.0, float("inf"), "many"])
def test_a_loss_weight_must_be_a_finite_number(weight: Any) -> None:
    with pytest.raises(ScheduleError, match=r"loss_weight gave .* for microbatch 0"):
        loss_weights(lambda x: weight, [((torch.zeros(1),), {}, None)])


def test_a_loss_weight_gets_the_target_by_name() -> None:
    microbatches = split_batch((torch.zeros(4),), {}, torch.tensor([1, 0, 1, 1]), num_microbatches=2)
    assert loss_weights(lambda x, target=None: target.sum(), microbatches) == (1.0, 2.0)


class ReadsTarget(torch.nn.Module):
    """A model with an argument of its own that is called as the loss's target is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)])

    def forward(self, x, target=None):
        for layer in self.layers:
            x = layer(x)
        return (x - target).square().mean()


def test_a_model_may_have_an_argument_called_target():
    torch.manual_seed(0)
    model = ReadsTarget()
    x, target = torch.randn(2, 8, 4, dtype=torch.float64)
    parts = [{"x": x[rows], "target": target[rows]} for rows in (slice(0, 4), slice(4, 8))]
    for example in (((x, target), {}), ((x,), {"target": target})):
        pipe = fxpipe.compile(model, 2, *example, microbatches=4, schedule="GPipe").materialize(device="cpu")
        with pipe:
            named = {"target": target}
            losses = (
                pipe.step(x, target),
                pipe.step(x, **named),
                pipe.evaluate(x, **named),
                pipe.step(microbatches=parts),
            )
            for loss in (*losses, pipe.infer(x, **named)):
                torch.testing.assert_close(float(loss), float(model(x, target)), rtol=1e-12, atol=0)
            pipe.verify(x, **named)


def test_the_targets_of_the_model_and_of_the_loss_are_split_each_along_its_own_dimension():
    inner, outer = torch.zeros(3, 8), torch.arange(8)
    dims = BatchDims.of(("x", "target"), {"target": 1})
    parts = split_batch((torch.zeros(8, 2), inner), {}, target=outer, num_microbatches=4, dims=dims)
    assert [tuple(args[1].shape) for args, _, _ in parts] == [(3, 2)] * 4
    assert [target.tolist() for _, _, target in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_input_is_copied_once_through_pinned_memory_when_it_is_asked_for() -> None:
    class Host:
        """A tensor that says what is done with it."""

        device, pinned = torch.device("cpu"), False

        def __init__(self) -> None:
            self.done: list[str] = []

        def is_pinned(self) -> bool:
            return self.pinned

        def pin_memory(self) -> Host:
            self.done.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> str:
            self.done.append(f"to {device}, {non_blocking}")
            return str(device)

    first, second = Host(), Host()
    second.pinned = True
    inputs = dataclasses.replace(name_inputs((), (), {"scale": 2}), tensors={"first": first, "second": second})  # type: ignore[dict-item]
    moving = OnDevice(inputs, torch.device("cuda:1"))
    assert (list(moving), len(moving), moving["scale"], first.done) == (["first", "second", "scale"], 3, 2, [])
    assert [moving["first"], moving["first"]] == ["cuda:1"] * 2
    assert (first.done, second.done) == (["pinned", "to cuda:1, True"], [])
    assert (moving["second"], second.done) == ("cuda:1", ["to cuda:1, True"])


@pytest.mark.parametrize("name", ["last", "microbatches", "scaler", "gather"])
def test_an_argument_of_the_model_that_step_would_take_is_refused(name: str) -> None:
    class Named(torch.nn.Linear):
        def forward(self, x: torch.Tensor, **kwargs: torch.Tensor | None) -> torch.Tensor:
            return super().forward(x) + kwargs.get(name, 0)

    x = torch.zeros(4, 2)
    with pytest.raises(
        fxpipe.ScheduleError, match=f"keyword argument '{name}'.*\n  pass what the model calls '{name}' by"
    ):
        fxpipe.compile(Named(2, 2), 1, (x,), {name: x})


@pytest.mark.parametrize("made", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs_are_refused_by_name(made: Any) -> None:
    model, x = torch.nn.Linear(4, 4), torch.eye(4)
    options = {"loss_fn": torch.nn.functional.mse_loss, "microbatches": 2, "schedule": "GPipe"}
    with pytest.raises(fxpipe.ScheduleError, match=r"cannot split input of layout torch\.sparse.*pass it dense"):
        fxpipe.compile(model, 1, (made(x),), {"target": x}, **options)
    with pytest.raises(fxpipe.CaptureError, match=r"input input is a torch\.Tensor of layout torch\.sparse"):
        fxpipe.compile(model, 1, (made(x),), {"target": x}, batch_dims={"input": None, "target": 0}, **options)
    pipe = fxpipe.compile(model, 1, (x,), {"target": x}, **options)
    with (
        pipe.materialize(device="cpu"),
        pytest.raises(fxpipe.ScheduleError, match=r"split target of layout torch\.sparse"),
    ):
        pipe.step(x, target=made(x))

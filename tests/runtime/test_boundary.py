"""Tensors become messages and tensors again, bit for bit."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxpipe
from fxpipe.ir.tensor import TensorMeta
from fxpipe.program import BoundaryTensor
from fxpipe.runtime.build.boundary import (
    PACKED_BYTES,
    absent,
    conform,
    gradient_layout,
    is_absent,
    join,
    message_layout,
    pack,
    receive_buffers,
)

CPU = torch.device("cpu")
DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int8", "bool", "complex64", "uint8", "float8_e4m3fn")


@st.composite
def boundaries(draw):
    found = []
    for index in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        if draw(st.integers(0, 5)) == 0:
            shape = (draw(st.integers(40_000, 90_000)),)
        dtype = draw(st.sampled_from(DTYPES))
        order = draw(st.permutations(range(len(shape))))
        strides, step = [0] * len(shape), 1
        for axis in order:
            strides[axis] = step
            step *= max(shape[axis], 1)
        found.append(BoundaryTensor(str(index), TensorMeta(shape, dtype, draw(st.booleans())), tuple(strides)))
    return tuple(found)


def filled(declared):
    dtype = getattr(torch, declared.meta.dtype)
    tensor = torch.empty_strided(declared.meta.shape, declared.strides, dtype=dtype)
    raw = torch.randint(0, 2, (tensor.numel() * dtype.itemsize,), dtype=torch.uint8)
    tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).copy_(raw)
    return tensor


def bits(tensor):
    return tensor.flatten().view(torch.uint8) if tensor.numel() else tensor


@settings(deadline=None, max_examples=60)
@given(boundaries(), st.data())
def test_a_gradient_that_is_none_is_told_from_those_that_are_not(declared, data):
    declared = tuple(what for what in declared if getattr(torch, what.meta.dtype).is_floating_point)
    layout = message_layout(declared)
    flags = [data.draw(st.booleans()) for _ in declared]
    sent = [absent(what, CPU) if flag else filled(what) for flag, what in zip(flags, declared, strict=True)]
    buffers, received = receive_buffers(layout, CPU)
    for message, buffer in zip(pack(layout, sent), buffers, strict=True):
        buffer.copy_(message)
    assert [is_absent(each) for each in received] == [
        flag and each.numel() > 0 for flag, each in zip(flags, received, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_no_number_stands_for_none(dtype):
    finfo = torch.finfo(dtype)
    values = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, finfo.max, finfo.min, finfo.tiny]
    values = torch.tensor(values, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    made = torch.stack([zero / zero, -(zero / zero), values[2] - values[2], zero * values[3], values[3] / values[3]])
    for value in (*values, *made):
        assert not is_absent(value.expand(2, 3).contiguous())
    assert not is_absent(torch.cat([absent(BoundaryTensor("", TensorMeta((3,), str(dtype)[6:])), CPU), values]))


@settings(deadline=None, max_examples=60)
@given(boundaries())
def test_what_is_received_is_what_was_sent(declared):
    layout = message_layout(declared)
    sent = [filled(what) for what in declared]
    messages = pack(layout, sent)
    buffers, received = receive_buffers(layout, CPU)
    assert [message.shape for message in messages] == [buffer.shape for buffer in buffers]
    assert len(messages) == layout.num_messages
    for message, buffer in zip(messages, buffers, strict=True):
        buffer.copy_(message)
    for one, other, what in zip(sent, received, declared, strict=True):
        assert other.dtype == one.dtype
        assert other.shape == one.shape
        assert other.stride() == what.strides
        assert torch.equal(bits(other), bits(one))


@settings(deadline=None)
@given(boundaries())
def test_packed_tensors_lie_apart_aligned_and_within_the_limit(declared):
    layout = message_layout(declared)
    taken = sorted(
        (offset, offset + what.meta.nbytes)
        for offset, what in zip(layout.offsets, declared, strict=True)
        if offset is not None
    )
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
    assert all(start % 16 == 0 for start, _ in taken)
    assert max((end for _, end in taken), default=0) == layout.packed_bytes
    assert layout.packed_bytes <= PACKED_BYTES + 16 * len(declared)


def test_only_tensors_with_a_gradient_get_one_back():
    declared = tuple(BoundaryTensor(str(i), TensorMeta((2,), "float32", requires_grad=i % 2 == 0)) for i in range(5))
    assert [what.name for what in gradient_layout(declared).tensors] == ["0", "2", "4"]


def test_writing_into_one_received_tensor_does_not_count_as_writing_into_another():
    declared = tuple(BoundaryTensor(name, TensorMeta((3,), "float32", requires_grad=True)) for name in "ab")
    _, (a, b) = receive_buffers(message_layout(declared), CPU)
    a.zero_()
    b.zero_()
    before = b._version
    a.add_(1)
    assert b._version == before
    assert torch.equal(b, torch.zeros(3))


@pytest.mark.parametrize(
    "make", [lambda x: x.view(6), lambda x: x.t(), lambda x: x[0], lambda x: x, lambda x: x.expand(4, 2, 3)]
)
def test_joined_tensors_are_neither_views_nor_leaves_nor_copies(make):
    leaf = torch.ones(2, 3, requires_grad=True)
    tensor = make(leaf)
    (joined,) = join([tensor])
    assert not joined._is_view()
    assert not joined.is_leaf
    assert joined.data_ptr() == tensor.data_ptr()
    joined.sum().backward()
    assert leaf.grad is not None
    joined.detach_()


def test_tensors_without_a_gradient_stay_as_they_are_beside_joined_ones():
    index, mask = torch.arange(3), torch.ones(3)
    weight = torch.ones(3, requires_grad=True)
    out = join([index, weight * 2, mask])
    assert out[0] is index
    assert out[2] is mask
    with torch.no_grad():
        assert join([weight])[0] is weight


def test_a_single_tensor_that_is_neither_view_nor_leaf_stays_as_it_is():
    leaf = torch.ones(3, requires_grad=True)
    made, mask = leaf * 2, torch.ones(3)
    assert all(out is given for out, given in zip(join([mask, made]), [mask, made], strict=True))
    several = join([made, leaf * 3])
    assert several[0] is not made
    assert several[0].grad_fn is several[1].grad_fn


def test_writing_into_a_joined_tensor_is_seen_by_what_was_saved_of_it():
    leaf = torch.ones(3, requires_grad=True)
    saved = leaf.exp()  # its backward needs its own output
    (joined,) = join([saved])
    joined.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        joined.sum().backward()


def test_a_tensor_takes_its_declared_strides():
    image = torch.randn(2, 3, 4, 5, requires_grad=True)
    last = image.to(memory_format=torch.channels_last)
    wanted = BoundaryTensor("x", TensorMeta((2, 3, 4, 5), "float32", True), tuple(last.stride()))
    found = conform(image, wanted)
    assert found.stride() == last.stride()
    assert torch.equal(found, image)
    found.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))
    assert conform(last, wanted) is last
    plain = BoundaryTensor("x", TensorMeta((2, 3, 4, 5), "float32", True))
    assert conform(last, plain).is_contiguous()
    wide = conform(torch.ones(1).expand(7), BoundaryTensor("x", TensorMeta((7,), "float32")))
    assert wide.stride() == (1,)
    conjugated = conform(torch.tensor([1 + 2j]).conj(), BoundaryTensor("x", TensorMeta((1,), "complex64")))
    assert not conjugated.is_conj()
    assert conjugated.imag.item() == -2.0
    assert math.isclose(conjugated.real.item(), 1.0)


class Shifted(nn.Module):
    """Its first stage sends a part of a frozen weight."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(9, 4), requires_grad=False)
        self.register_buffer("middle", torch.zeros(4))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        places = self.places[: x.shape[1]].detach()
        x = self.layers[0](x + places + self.middle)
        return (self.layers[1](x) * self.middle.view(4) + places).mean()


def test_nothing_crosses_in_the_memory_of_a_parameter_or_buffer():
    x = torch.randn(4, 3, 4)
    options = {"cost": "parameters", "grain": "block", "loss_weight": "microbatch"}
    pipe = fxpipe.compile(Shifted(), 2, (x,), microbatches=2, **options)
    with pipe.materialize(device="cpu"):
        sent = []
        first, _ = pipe.stage_modules
        first.register_forward_hook(lambda stage, given, results: sent.append(results))
        pipe.step(x)
        pipe.infer(x)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*first.parameters(), *first.buffers())}
        assert [len(results) for results in sent] == [2, 2, 2]
        assert not any(tensor.untyped_storage().data_ptr() in own for results in sent for tensor in results)

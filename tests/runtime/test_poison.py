import pytest
import torch

from fxpipe.runtime.build.poison import OTHER_POISON, POISON, looks_untouched, poisoned, same_bytes

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2fnuz]
DTYPES = [*FLOATS, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def zeros(shape, dtype):
    return torch.zeros(shape, dtype=torch.uint8).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_left_is_seen_in_every_dtype(dtype):
    tensor = poisoned(torch.empty(3, 5, dtype=dtype, device="meta"), POISON)
    assert tensor.dtype == dtype
    assert looks_untouched(tensor)
    tensor[:2] = zeros((2, 5), dtype)
    tensor[2, :4] = zeros((4,), dtype)
    assert looks_untouched(tensor)
    tensor[2, 4] = zeros((), dtype)
    assert not looks_untouched(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_two_poisons_differ_in_every_dtype(dtype):
    meta = torch.empty(2, dtype=dtype, device="meta")
    assert not same_bytes(poisoned(meta, POISON), poisoned(meta, OTHER_POISON))
    assert same_bytes(poisoned(meta, POISON), poisoned(meta, POISON))


@pytest.mark.parametrize("dtype", FLOATS[:4])
def test_what_is_computed_from_untouched_memory_is_seen(dtype):
    tensor = poisoned(torch.empty(8, dtype=dtype, device="meta"), POISON)
    assert looks_untouched(tensor.mul_(0.5).add_(1).clamp_(-1, 1))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_tensors_have_memory_too(shape):
    tensor = poisoned(torch.empty(shape, device="meta"), POISON)
    assert tensor.shape == shape
    assert looks_untouched(tensor) == (tensor.numel() > 0)


def test_strides_are_kept():
    meta = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    tensor = poisoned(meta, POISON)
    assert tensor.stride() == meta.stride()
    assert looks_untouched(tensor)

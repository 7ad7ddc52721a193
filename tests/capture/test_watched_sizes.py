"""However Python reads a size that values decide about, it is heard; a batch with another answer gets another graph."""

import copy
import functools
import json
import math
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxpipe
from fxpipe.capture.record.guards import WatchedShape

SIZE = torch.Size([6, 8])


def matched(shape):
    match shape:
        case (6, _):
            return True
    return False


def unpacked(shape):
    first, *_ = shape
    return first


def compared(comparison, other, turned, shape):
    return comparison(other, shape) if turned else comparison(shape, other)


COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
READINGS = {
    "[0]": lambda s: s[0],
    "[-2]": lambda s: s[-2],
    "[int64]": lambda s: s[np.int64(0)],
    "[tensor]": lambda s: s[torch.tensor(0)],
    "[slice][0]": lambda s: s[:1][0],
    "[slice].numel": lambda s: s[:1].numel(),
    "tuple.__getitem__": lambda s: int(tuple.__getitem__(s, 0)),
    "tuple.__getitem__ in arithmetic": lambda s: 2.5 * tuple.__getitem__(s, 0) + 1,
    "itemgetter": lambda s: operator.itemgetter(0)(s),
    "in": lambda s: 6 in s,
    "not in": lambda s: 7 not in s,
    "contains": lambda s: operator.contains(s, 6),
    "countOf": lambda s: operator.countOf(s, 6),
    "indexOf": lambda s: operator.indexOf(s, 6),
    "index": lambda s: s.index(8),
    "count": lambda s: s.count(6),
    **{f"{each.__name__} tuple": functools.partial(compared, each, (6, 9), False) for each in COMPARISONS},
    **{f"tuple {each.__name__}": functools.partial(compared, each, (6, 9), True) for each in COMPARISONS},
    **{f"Size {each.__name__}": functools.partial(compared, each, SIZE, True) for each in COMPARISONS},
    "in a list": lambda s: s in [SIZE],
    "counted in a list": lambda s: [SIZE].count(s),
    "in a set": lambda s: s in {SIZE},
    "key": lambda s: {SIZE: 3}.get(s),
    "hash": hash,
    "iterate": lambda s: [size + 1 for size in s],
    "tuple.__iter__": lambda s: [int(size) for size in tuple.__iter__(s)],
    "next": lambda s: next(iter(s)),
    "reversed": lambda s: list(reversed(s)),
    "enumerate": lambda s: list(enumerate(s)),
    "zip": lambda s: list(zip(s, "ab", strict=True)),
    "list": list,
    "tuple": tuple,
    "set": set,
    "Size": torch.Size,
    "sorted": sorted,
    "sum": sum,
    "max": max,
    "min": min,
    "any": any,
    "all": all,
    "unpacked": unpacked,
    "starred": lambda s: max(*s),
    "matched": matched,
    "numel": lambda s: s.numel(),
    "math.prod": math.prod,
    "math.dist": lambda s: math.dist(s, (0, 0)),
    "np.prod": lambda s: int(np.prod(s)),
    "np.zeros": lambda s: np.zeros(s).size,
    "+ tuple": lambda s: s + (1,),  # noqa: RUF005
    "tuple +": lambda s: (1,) + s,  # noqa: RUF005
    "Size +": lambda s: SIZE + s,
    "+ Size": lambda s: s + SIZE,
    "concat": lambda s: operator.concat((1,), s) == (1, 6, 8),
    "* 2": lambda s: s * 2,
    "2 *": lambda s: 2 * s,
    "extend": lambda s: operator.iadd([], s),
    "repr": repr,
    "str": str,
    "f-string": lambda s: f"{s}",
    "format": lambda s: f"{s[0]}",
    "%d": lambda s: "%d %d" % s,  # noqa: UP031
    "%s": lambda s: "%s %s" % s,  # noqa: UP031
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "json": json.dumps,
    "torch.ones": lambda s: torch.ones(s).shape,
    "view": lambda s: torch.ones(48).view(s).shape,
    "expand": lambda s: torch.ones(1, 8).expand(s).shape,
    "tensor": lambda s: torch.tensor(s).tolist(),
    "broadcast_shapes": lambda s: torch.broadcast_shapes(s, (1, 8)),
}


@pytest.mark.parametrize("reading", READINGS)
def test_a_reading_is_heard_and_gives_what_it_gives_of_a_size(reading):
    heard = []
    found = READINGS[reading](WatchedShape.of(SIZE, [0], lambda: heard.append(1)))
    expected = READINGS[reading](SIZE)
    assert heard
    assert (found, type(found)) == (expected, type(expected))


def test_what_says_nothing_of_the_sizes_that_vary_is_not_heard():
    heard = []
    shape = WatchedShape.of(SIZE, [0], lambda: heard.append(1))
    assert (len(shape), bool(shape), isinstance(shape, torch.Size)) == (2, True, True)
    assert (shape[1], shape[-1], shape[1:], shape[1:].numel(), tuple(shape[1:])) == (8, 8, (8,), 8, (8,))
    assert shape[1:] != (9,)
    assert not heard


def test_all_that_an_integer_does_a_size_in_the_tuple_does():
    size = tuple.__getitem__(WatchedShape.of((6,), [0], lambda: None), 0)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"):
        function = getattr(operator, name)
        assert (function(size, 2), function(2, size)) == (function(6, 2), function(2, 6))
    assert (-size, +size, ~size, abs(size), round(size), divmod(size, 4)) == (-6, 6, ~6, 6, 6, (1, 2))
    assert (int(size), float(size), complex(size), range(size)) == (6, 6.0, 6 + 0j, range(6))


class Selecting(nn.Module):
    """Weighs its loss by something that it reads of what a mask selects, or of what is computed of that."""

    def __init__(self, weight):
        super().__init__()
        self.embedding, self.out, self.weight = nn.Embedding(11, 8), nn.Linear(8, 8), weight

    def forward(self, ids, mask):
        hidden = self.out(self.embedding(ids))
        selected = hidden[mask]
        return {"loss": hidden.mean() * self.weight(selected, hidden) + selected.sum() * 0.01}


WEIGHTS = {
    "in": lambda s, h: 2.0 if 6 in s.shape else 1.0,
    "another's shape": lambda s, h: 2.0 if h.reshape(-1, 8)[:6].shape == s.shape else 1.0,
    "ones_like": lambda s, h: torch.ones_like(s).sum(),
    "nbytes": lambda s, h: float(s.nbytes),
    "is_same_size": lambda s, h: 2.0 if s.is_same_size(h.reshape(-1, 8)[:6]) else 1.0,
    "a size that another is by chance": lambda s, h: float(torch.cat([s, s]).shape[0]),
    "at most some": lambda s, h: float(s[:5].shape[0]),
    "of a module": lambda s, h: float(F.linear(s, torch.ones(6, 8, dtype=s.dtype)).shape[0]),
}


def masks(*counts):
    return [(torch.arange(24) < count).view(4, 6) for count in counts]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_another_number_of_selected_elements_is_answered_anew(weight):
    torch.manual_seed(0)
    model, ids = Selecting(WEIGHTS[weight]).double(), torch.randint(0, 11, (4, 6))
    first, *others = masks(6, 4, 9)
    options = {"microbatches": 1, "schedule": "GPipe", "loss_weight": "microbatch"}
    with fxpipe.compile(model, 2, (ids, first), **options).materialize(device="cpu") as pipe:
        for mask in (first, *others):
            expected = model(ids, mask)["loss"].detach()
            torch.testing.assert_close(pipe.step(ids, mask), expected, rtol=1e-12, atol=1e-12)


def test_sizes_that_values_do_not_decide_about_are_no_guards():
    def weight(s, h):
        wide = F.linear(s, torch.ones(6, 8, dtype=s.dtype)).view(-1, 2, 3)
        return wide.shape[1] * wide.size(2) * s.shape[-1] * wide.dim() * s.T.shape[0] * torch.ones_like(wide)[:2].mean()

    torch.manual_seed(0)
    model, ids = Selecting(weight).double(), torch.randint(0, 11, (4, 6))
    masked = masks(6, 4, 9, 3)
    options = {"microbatches": 1, "schedule": "GPipe", "loss_weight": "microbatch"}
    with fxpipe.compile(model, 2, (ids, masked[0]), **options).materialize(device="cpu") as pipe:
        for mask in masked:
            expected = model(ids, mask)["loss"].detach()
            torch.testing.assert_close(pipe.step(ids, mask), expected, rtol=1e-12, atol=1e-12)
        assert pipe._trainer.variants.num_captures == 0


@pytest.mark.parametrize("when", ["before", "after", "elsewhere"])
def test_a_mask_counts_as_the_selection_saw_it(when):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(11, 8), nn.Linear(8, 8)

        def forward(self, ids, mask):
            hidden, mask = self.out(self.embedding(ids)), mask.clone()
            if when == "before":
                mask[:, 0] = False
            selected = hidden.detach()[mask]
            if when == "after":
                mask[:, 0] = False
            if when == "elsewhere":
                mask.view(-1)[3:].logical_not_()
            return {"loss": hidden.mean() * len(selected) + hidden[:, 0].mean() * mask.any() * mask.sum()}

    torch.manual_seed(0)
    model, ids = Masked().double(), torch.randint(0, 11, (4, 6))
    given = [torch.rand(4, 6) < share for share in (0.5, 0.3, 0.8, 0.5, 0.5)]
    given[3][:, 0], given[4][:, 0] = False, True
    options = {"microbatches": 1, "schedule": "GPipe", "loss_weight": "microbatch"}
    with fxpipe.compile(model, 2, (ids, given[0]), **options).materialize(device="cpu") as pipe:
        for mask in given:
            expected = model(ids, mask)["loss"].detach()
            torch.testing.assert_close(pipe.step(ids, mask), expected, rtol=1e-12, atol=1e-12)

"""Containers of every kind are walked and rebuilt; what is a value of numbers, or said to be whole, is a leaf."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fxpipe.ir.tree import map_tree, tree_leaves

Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Sample:
    ids: Any


class Checked(list[Any]):
    """A container that refuses what is no tensor."""

    def __init__(self, parts: Any) -> None:
        super().__init__(parts)
        if not all(isinstance(part, torch.Tensor) for part in self):
            raise TypeError("tensors only")


CONTAINERS = {
    "list": lambda leaf: [leaf, [leaf]],
    "tuple": lambda leaf: (leaf, (leaf,)),
    "namedtuple": lambda leaf: Pair(leaf, leaf),
    "result of torch": lambda leaf: torch.return_types.max((leaf, leaf)),
    "mapping": lambda leaf: {"a": leaf, "b": leaf},
    "ordered": lambda leaf: collections.OrderedDict(a=leaf, b=leaf),
    "user's mapping": lambda leaf: collections.UserDict(a=leaf, b=leaf),
    "dataclass": lambda leaf: Sample(Sample([leaf, leaf])),
    "checked": lambda leaf: Checked([leaf, leaf]),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_is_rebuilt_of_its_own_class(make: Any) -> None:
    one, two = torch.ones(1), torch.zeros(1)
    before = make(one)
    after = map_tree(lambda _path, leaf: two if leaf is one else leaf, before)
    assert type(after) is type(before)
    assert [leaf is two for _, leaf in tree_leaves(after)] == [True, True]
    assert [leaf is one for _, leaf in tree_leaves(before)] == [True, True]  # unchanged


def test_a_size_is_a_leaf_whatever_its_length() -> None:
    for size in (torch.Size([]), torch.Size([2]), torch.Size([2, 3])):
        assert list(tree_leaves([size])) == [("[0]", size)]


def test_classes_said_to_be_whole_are_leaves_at_any_depth() -> None:
    packed = pack_sequence([torch.zeros(2, 3), torch.zeros(1, 3)])
    assert len(list(tree_leaves(packed))) == len(packed)
    for value in (packed, [packed], {"a": (packed,)}, Sample(packed)):
        ((_, leaf),) = tree_leaves(value, whole=(PackedSequence,))
        assert leaf is packed

import random

import numpy as np
import pytest
import torch

from fxpipe.runtime.build.generators import kept_generators, seed_generators


def draws():
    return torch.rand(3).tolist(), random.random(), np.random.random(3).tolist()


def seeded(*names):
    with kept_generators():
        seed_generators(*names)
        return draws()


def test_equal_names_give_equal_draws_and_others_do_not():
    assert seeded(0, "h.1") == seeded(0, "h.1")
    different = [seeded(0, "h.1"), seeded(1, "h.1"), seeded(0, "h.11"), seeded(0, "h", 1), seeded(0, "h", "1", "")]
    for which in range(3):
        assert len({repr(draw[which]) for draw in different}) == len(different)


def test_every_generator_is_left_as_it_was():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = draws()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    with kept_generators():
        torch.manual_seed(8)
        draws()
    with pytest.raises(ZeroDivisionError), kept_generators():
        seed_generators(int(draws()[1] / 0))
    assert draws() == expected

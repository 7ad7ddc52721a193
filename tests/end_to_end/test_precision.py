"""Sixteen bits and compiled code on two ranks: one launch for the ordinary cases, one for all others."""

import functools

import launch
import precision_worker
import pytest


@functools.cache
def said(*names):
    return launch.launch_cases("end_to_end/precision_worker.py", precision_worker.RANKS, *names)


@pytest.mark.parametrize("case", precision_worker.ORDINARY)
def test_on_two_ranks(case):
    launch.passed(said(*precision_worker.ORDINARY), case, precision_worker.RANKS)


OTHERS = tuple(name for name in precision_worker.cases() if name not in precision_worker.ORDINARY)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_all_others_on_two_ranks(case):
    launch.passed(said(*OTHERS), case, precision_worker.RANKS)

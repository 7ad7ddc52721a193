"""Marks along the heaviest path: for all cuts of small graphs, and bounds from them against all partitions.

Drawn from: seconds and transfers in eighths from 0 to 10 s (zeros often), far links dearer, cheaper or free apart from
the near ones, up to seven nodes with any edges and values, two ranks whose stages loop, two or three each, turn back,
or take turns in another way.
"""

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_partition import EXACT_TIME, FREE_FAR_LINK, brute_force, problems

from fxpipe.planning.search.downsets import downset_costs, enumerate_downsets
from fxpipe.planning.search.instance import make_instance, without_memory, without_tie_loads
from fxpipe.planning.search.orders import by_priority
from fxpipe.planning.search.partition import partition_nodes
from fxpipe.planning.search.problem import PartitionProblem, Placement, TransferValue
from fxpipe.planning.search.reductions import reduced
from fxpipe.planning.search.request import Request
from fxpipe.planning.search.several.lines import line_bound
from fxpipe.planning.search.spine import cuts, parts
from fxpipe.planning.search.spine.cuts import spine_marks
from fxpipe.planning.search.spine.line import Line, thinned


@pytest.fixture(scope="module", autouse=True)
def any_share():
    """Let the heaviest path have any share of the load."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuts, "LEAST_SHARE", 0.0)
        yield


RANKS = st.sampled_from([(0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1, 0, 1), (0, 1, 1, 0, 0, 1), (0, 0, 1, 1)])


def marks_in_a_row(line, chain, costs):
    """Tell whether each cut of a chain, one within the next, has a mark that may stand for it, by the line's rules."""
    reached = None
    for cut in chain:
        load, crossed = costs[cut]
        fits = (line.ends <= load + crossed) & (line.begins >= load - crossed)
        if reached is not None:
            for mark in np.flatnonzero(fits).tolist():
                before = reached[: mark + 1].copy()
                before[mark] &= line.shared[mark]
                before[list(line.apart.get(mark, ()))] = False
                fits[mark] = before.any()
        reached = fits
    return reached is None or bool(reached.any())


def check_rows(problem, exactly, numbers, count):
    """Check that marks stand in a row for the cuts of some orders, each of them as fine as may be."""
    instance = without_memory(make_instance(problem))
    if exactly and not instance.anchors.all():
        instance = reduced(instance).instance
    crossing = instance.values.column(0)
    marks = spine_marks(instance, crossing, exactly=exactly)
    assume(marks)
    masks = enumerate_downsets(instance, 1000)
    loads, crossed, _ = downset_costs(instance, masks, crossing)
    costs = dict(zip(masks, zip(loads.tolist(), crossed.tolist(), strict=True), strict=True))
    whole = (1 << instance.size) - 1
    for _ in range(5):
        order = by_priority(instance, [numbers.random() for _ in range(instance.size)])
        chain = list(itertools.accumulate((1 << node for node in order), initial=0))
        chain = [cut for cut in chain if not exactly or cut not in (0, whole)]
        if not exactly:
            chain = [cut for cut in chain for _ in range(2)]  # stages may be left out
        for kept in (marks, thinned(marks, count)):
            assert marks_in_a_row(Line.of(kept), chain, costs)


SHUFFLES = st.randoms(use_true_random=False)


@settings(max_examples=40, deadline=None)
@given(problems(extras=True, time=EXACT_TIME), st.booleans(), SHUFFLES, st.integers(1, 6))
def test_for_cuts_within_each_other_marks_stand_in_a_row(problem, exactly, numbers, count):
    check_rows(problem, exactly, numbers, count)


@pytest.mark.parametrize("limit", [(parts, "MOST_TOGETHER", 1), (parts, "MOST_FLOW", -1), (cuts, "MOST_DEPTH", 0)])
def test_marks_stand_also_where_the_search_for_them_ends_early(limit, monkeypatch):
    monkeypatch.setattr(*limit)

    @settings(max_examples=10, deadline=None)
    @given(problems(extras=True, time=EXACT_TIME), st.booleans(), SHUFFLES)
    def check(problem, exactly, numbers):
        check_rows(problem, exactly, numbers, 4)

    check()


@settings(max_examples=40, deadline=None)
@given(problems(extras=True, time=EXACT_TIME), RANKS, st.lists(st.booleans(), min_size=5, max_size=5), st.booleans())
@example(FREE_FAR_LINK, (0, 1, 0, 1), [True] * 5, True)
@example(FREE_FAR_LINK, (0, 1, 1, 0), [True] * 5, False)
def test_no_partition_has_less_than_marks_say(problem, ranks, far, exactly):
    placement = Placement.simple(len(ranks), rank_of_stage=ranks, far=far[: len(ranks) - 1])
    (best, _), _ = brute_force(problem, len(ranks), placement, exactly=exactly)
    assume(best < float("inf"))
    instance = without_memory(without_tie_loads(make_instance(problem)))
    small = instance if exactly and instance.anchors.all() else reduced(instance).instance
    request = Request.of(len(ranks), "adjacent", exactly, None, placement)
    assert instance.seconds(line_bound(small, request, 0, instance.load_units(2 * best + 1))) <= best


def translator(blocks):
    """Make an encoder and a decoder: each has a table that all of its blocks read, the decoder reads the encoder."""
    seconds, edges, values = [0.2], [], []

    def node(cost, *befores):
        seconds.append(cost)
        edges.extend((before, len(seconds) - 1) for before in befores)
        return len(seconds) - 1

    def moves(cost, *nodes):
        values.append(TransferValue(cost, nodes))

    def side(stream, source):
        table = node(0.03, stream)
        readers = []
        for _ in range(blocks):
            begin = stream
            norm = node(0.04, begin)
            parts_of_it = [node(0.1, norm) for _ in range(2)]
            readers.append(node(0.02, table))
            stream = node(0.3, *parts_of_it, readers[-1])
            moves(0.1, norm, *parts_of_it)
            moves(0.5, readers[-1], stream)
            if source:
                key = node(0.1, source)
                read_by.append(key)
                stream, before = node(0.2, stream, key), stream
                moves(0.1, before, stream)
                moves(0.1, key, stream)
            for part in parts_of_it:
                moves(0.1, part, stream)
            add = node(0.01, begin, stream)
            moves(0.1, stream, add)
            moves(0.1, begin, norm, add)
            stream = add
        moves(0.5, table, *readers)
        return stream

    read_by: list[int] = []
    encoded = node(0.04, side(0, None))
    moves(0.1, encoded - 1, encoded)
    first = node(0.2)
    last = side(first, encoded)
    moves(0.1, encoded, *read_by)
    end = node(1.0, last)
    moves(0.1, last, end)
    return PartitionProblem(tuple(seconds), tuple(edges), tuple(values))


@pytest.mark.parametrize("ranks", [(*range(4), *range(4)), (*range(4), *range(3, -1, -1))])
def test_an_encoder_and_its_decoder_are_cut_to_within_four_hundredths_of_the_bound(ranks):
    problem = translator(12)
    found = partition_nodes(problem, 8, exactly=True, rank_of_stage=ranks)
    assert found.bottleneck <= 1.04 * found.lower_bound  # 1.13 where cuts may coincide and the table may be anywhere

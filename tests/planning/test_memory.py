"""Bytes per rank, against a judge that walks over every tensor a stage holds."""

from __future__ import annotations

import dataclasses
import itertools
import math

import layer_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxpipe.ir.cost import LayerCounts, OpCount
from fxpipe.ir.hardware import OPTIMIZER_STATES, Training
from fxpipe.ir.schedule import live_sets
from fxpipe.ir.tensor import dtype_bytes
from fxpipe.planning.layout import make_layout
from fxpipe.planning.search.problem import measure


def needers(graph, layer):
    """Layers that are not recomputed and need ``layer``, itself if it is one."""
    if layer not in graph.recomputed:
        return {layer}
    later = [after for before, after in graph.free_edges if before == layer]
    return set().union(*(needers(graph, after) for after in later), set())


def parameter_bytes(info, training):
    """Weight, gradient, state and master weight, counted by hand."""
    numel = math.prod(info.shape)
    width = dtype_bytes(training.param_dtype or info.dtype)
    shards = training.data_parallel if training.fsdp else 1
    state = OPTIMIZER_STATES[training.optimizer] * (
        dtype_bytes(training.state_dtype) if training.state_dtype else width
    )
    master = 4 if training.master_weights and width < 4 else 0
    sharded = -(-numel * (width + state + master) // shards)
    whole = numel * width if shards > 1 else 0
    return sharded + whole + numel * max(width, dtype_bytes(training.grad_dtype))


def rank_memory(graph, stage_of, made_for):
    """Bytes of every rank: tensors by name, so that none counts twice."""
    training, names = made_for.training, graph.layer_names
    scale = 0.5 if training.param_dtype == "bfloat16" else 1
    free = set(graph.recomputed)
    recomputes = training.recompute == "block"
    block_of = {
        layer: block
        for layer, block in enumerate(graph.blocks)
        if recomputes and block.rpartition(".")[2].isdigit() and layer not in free
    }
    tie_of = {fqn: tie.key for tie in graph.ties for fqn in tie.fqns}
    values = {value.name: value for value in graph.values}
    held = [{} for _ in range(made_for.ranks)]
    fixed, alive = [0] * made_for.stages, [{} for _ in range(made_for.stages)]
    working = [{} for _ in range(made_for.ranks)]
    savers = {saved.name: set().union(*(needers(graph, layer) for layer in saved.layers)) for saved in graph.saved}
    sizes = {saved.name: saved.meta.nbytes * scale for saved in graph.saved}
    inside = {}
    for layer, spec in enumerate(graph.specs):
        for needer in needers(graph, layer):
            stage = stage_of[needer]
            rank = made_for.rank_of_stage[stage]
            for info in spec.parameters:
                held[rank][tie_of.get(info.fqn, info.fqn)] = parameter_bytes(info, training)
            if layer in block_of:
                inside.setdefault(block_of[layer], {})[f"of {names[layer]}"] = graph.counts[layer].saved_bytes * scale
            else:
                alive[stage][f"of {names[layer]}"] = graph.counts[layer].saved_bytes * scale
    for name, layers in savers.items():
        for layer in layers:
            if name in values:
                value = values[name]
                own = block_of.get(value.producer)
                kept = any(saver not in block_of for saver in layers) or any(
                    block_of.get(reader, own) != own for reader in value.readers
                )
                if not kept and own is not None:
                    inside[own][name] = sizes[name]
            if layer not in block_of or name not in values:
                alive[stage_of[layer]][name] = sizes[name]
    for value in graph.values:
        size = value.meta.nbytes * scale
        own = block_of.get(value.producer)
        stages = {stage_of[layer] for layer in (value.producer, *value.readers)}
        into_checkpoint = any(block_of.get(reader, own) != own for reader in value.readers)
        saved = into_checkpoint or any(layer not in block_of for layer in savers.get(value.name, ()))
        if saved:
            alive[min(stages)][value.name] = size
        for stage in range(min(stages), max(stages)):
            if made_for.rank_of_stage[stage] == made_for.rank_of_stage[stage + 1]:
                continue
            if not saved:
                alive[stage][f"{value.name} sent"] = size
            alive[stage + 1].pop(value.name, None)
            alive[stage + 1][f"{value.name} received"] = size
            gradient = size if value.meta.requires_grad else 0
            fixed[stage] += gradient
            fixed[stage + 1] += gradient + size
        if saved:  # kept as received, not once more
            for stage in stages - {min(stages)}:
                alive[stage].pop(value.name, None)
    for layer, block in block_of.items():
        rank = made_for.rank_of_stage[stage_of[layer]]
        gradients = [graph.counts[other].gradient_bytes * scale for other, own in block_of.items() if own == block]
        working[rank][block] = sum(inside[block].values()) + max(gradients)
    totals = []
    sets = live_sets(made_for.schedule, made_for.stages, made_for.ranks, made_for.num_microbatches)
    for rank in range(made_for.ranks):
        own = [stage for stage in range(made_for.stages) if made_for.rank_of_stage[stage] == rank]
        most = max(sum(n * sum(alive[s].values()) for n, s in zip(entry, own, strict=True)) for entry in sets[rank])
        static = sum(held[rank].values()) + sum(fixed[stage] for stage in own)
        totals.append(static + most + max(working[rank].values(), default=0))
    return totals


@st.composite
def graphs(draw, most_layers=6):
    """Small models: skips, ties, a recomputed table, blocks, and layers that keep this or that."""
    build = layer_graphs.Builder("Small")
    table = build.layer("table", (), (draw(st.integers(1, 5)),), free=True)
    names = []
    for index in range(draw(st.integers(3, most_layers))):
        reads = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        reads += [names[-1]] if names and names[-1] not in reads and draw(st.booleans()) else []
        reads += [table] if draw(st.booleans()) else []
        block = draw(st.sampled_from(["", "h.0", "h.1"]))
        weights = [("weight", (draw(st.integers(1, 4)),))] if draw(st.booleans()) else []
        shared = [("shared.weight", (3,))] if draw(st.booleans()) else []
        saves = [name for name in (*reads, "self") if draw(st.booleans())]
        name = build.layer(
            f"layer.{index}" if not block else f"{block}.{index}",
            reads,
            (2 * draw(st.integers(1, 6)),),
            weights + shared,
            flops=draw(st.integers(0, 9)) * 10**9,
            saves=saves,
            saved_bytes=4 * draw(st.integers(0, 5)),
            gradient_bytes=4 * draw(st.integers(0, 5)),
            block=block,
            grad=draw(st.booleans()),
        )
        names.append(name)
    graph = build.graph()
    if draw(st.booleans()):  # blocks of several calls need neighbours; sort the names so that each is one run
        blocks = sorted(graph.blocks[1:])
        graph = dataclasses.replace(graph, blocks=("", *blocks))
    else:
        graph = dataclasses.replace(graph, blocks=("",) * len(graph.specs))
    return graph


TRAININGS = st.builds(
    Training,
    optimizer=st.sampled_from(["adamw", "sgd", "sgd-momentum"]),
    param_dtype=st.sampled_from([None, "bfloat16"]),
    grad_dtype=st.sampled_from(["float32", "bfloat16"]),
    recompute=st.sampled_from([None, "block"]),
    data_parallel=st.sampled_from([1, 2]),
    state_dtype=st.sampled_from([None, "float32"]),
    master_weights=st.booleans(),
    fsdp=st.booleans(),
)


def assignments(graph, stages):
    """Every way to give the layers stages along the edges, no stage empty; recomputed layers have none.

    Results leave the model in the last stage, so the last layer that reads or is read lies there.
    """
    edges = [*graph.edges, *((value.producer, reader) for value in graph.values for reader in value.readers)]
    edges = [(a, b) for a, b in edges if a not in graph.recomputed]
    called = {layer for edge in (*edges, *graph.free_edges) for layer in edge} - set(graph.recomputed)
    layers = [layer for layer in range(len(graph.specs)) if layer not in graph.recomputed]
    for chosen in itertools.product(range(stages), repeat=len(layers)):
        if set(chosen) != set(range(stages)):
            continue
        stage_of = dict(zip(layers, chosen, strict=True))
        if all(stage_of[a] <= stage_of[b] for a, b in edges) and all(
            stage_of[layer] <= stage_of[max(called)] for layer in called
        ):
            yield stage_of


@settings(max_examples=150, deadline=None)
@given(graphs(), TRAININGS, st.integers(2, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_a_rank_needs_what_a_walk_over_its_tensors_counts(graph, training, stages, microbatches, randomly):
    schedule = "1F1B" if microbatches >= stages else "GPipe"
    made_for = layer_graphs.settings(stages, schedule=schedule, num_microbatches=microbatches, training=training)
    layout = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for)
    ways = list(itertools.islice(assignments(graph, stages), 2000))
    for stage_of in randomly.sample(ways, min(len(ways), 3)):
        measured = measure(layout.problem, [stage_of[layer] for layer in layout.layers], placement=layout.placement)
        assert list(measured.rank_memory) == rank_memory(graph, stage_of, made_for)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B", "ZBVZeroBubble", "Interleaved1F1B"])
def test_stages_of_one_rank_need_most_at_the_same_moment(schedule):
    ranks = 4 if schedule in ("GPipe", "1F1B") else 2
    graph = layer_graphs.gpt(blocks=4)
    made_for = layer_graphs.settings(4, ranks=ranks, schedule=schedule, num_microbatches=4)
    layout = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for)
    block = [int(name.split(".")[1]) if name.startswith("h.") else -1 for name in graph.layer_names]
    ends = {"wte": 0, "ln_f": 3, "lm_head": 3, "loss": 3}
    stage_of = {
        layer: ends.get(name, block[layer])
        for layer, name in enumerate(graph.layer_names)
        if layer not in graph.recomputed
    }
    measured = measure(layout.problem, [stage_of[layer] for layer in layout.layers], placement=layout.placement)
    assert list(measured.rank_memory) == rank_memory(graph, stage_of, made_for)
    per_rank = [0.0] * ranks
    for stage, nbytes in enumerate(measured.stage_memory):
        per_rank[made_for.rank_of_stage[stage]] += nbytes
    assert tuple(per_rank) == measured.rank_memory


def test_recomputed_blocks_keep_their_inputs_and_one_block_s_activations():
    graph = layer_graphs.gpt(blocks=8)
    plain, again = (
        layer_graphs.settings(2, training=Training(recompute=recompute), num_microbatches=8)
        for recompute in (None, "block")
    )
    kept = []
    for made_for in (plain, again):
        layout = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for)
        nodes = [int(layout.problem.name(node) >= "h.4" and node > 0) for node in range(len(layout.layers))]
        kept.append(measure(layout.problem, nodes, placement=layout.placement).per_live)
    stream = 32 * 64 * 4
    inputs_of_blocks = 4 * stream
    assert kept[0][0] > 10 * inputs_of_blocks
    assert kept[1][0] == inputs_of_blocks + stream + 32 * 32 * 4  # what goes to the next stage, and the mask


def test_positions_of_saved_inputs_stand_in_where_their_names_are_not_known():
    graph = layer_graphs.gpt(blocks=2)
    made_for = layer_graphs.settings(2)
    by_name = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for).problem
    names = {saved.name for saved in graph.saved if saved.name in {value.name for value in graph.values}}
    counts = []
    for layer, own in enumerate(graph.counts):
        kept = [saved.name for saved in graph.saved if layer in saved.layers and saved.name in names]
        own_name = graph.layer_names[layer]
        positions = [("output", 0) if name == own_name else ("input", place) for place, name in enumerate(kept)]
        counts.append(dataclasses.replace(own, saved_values=tuple(positions)))
    blind = dataclasses.replace(graph, saved=(), counts=tuple(counts))
    by_position = make_layout(blind, layer_graphs.estimate(blind, made_for), made_for).problem
    assert by_position.activation == by_name.activation
    assert by_position.values == by_name.values


def test_integers_that_a_layer_keeps_are_not_halved_with_its_dtype():
    build = layer_graphs.Builder("Model")
    build.layer("pick", shape=(4,), weights=[("weight", (8,))])
    graph = dataclasses.replace(
        build.graph(), counts=(LayerCounts((OpCount("index", "forward", 0, 64, "int64"),), saved_bytes=64),)
    )
    made_for = layer_graphs.settings(1, training=Training(param_dtype="bfloat16"))
    layout = make_layout(graph, layer_graphs.estimate(graph, made_for), made_for)
    assert layout.problem.activation == (64,)

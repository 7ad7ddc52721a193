"""Megatron-LM's ``--pipeline-model-parallel-layout``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fxpipe.errors import PlanError
from fxpipe.export.parts import parts_of
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan


def to_megatron(plan: PipelinePlan, graph: LayerGraph, source: str) -> str:
    """Write the arguments: ``E`` is the embedding, ``t`` a transformer layer, ``L`` the head with the loss.

    Stages are divided by ``|``, in the order of the pipeline; ``t*3`` is three layers. Megatron ties the embedding and
    the head by itself (``--untie-embeddings-and-output-weights`` where the model does not).

    Source: Megatron-LM, ``docs/`` on custom pipeline layouts, and
    ``megatron/core/transformer/pipeline_parallel_layer_layout.py``.

    Raises:
        PlanError: A cut lies inside a block, the embedding or the head is not on an end, or the placement is not
            Megatron's (stage ``i`` on rank ``i`` modulo the number of ranks).
    """
    parts = parts_of(plan, graph, "Megatron-LM")
    blocks = set(parts.blocks)
    if not blocks:
        raise PlanError("Megatron-LM cuts a list of layers, and this model has none\n  use the json format")
    ranks = [stage.rank for stage in plan.stages]
    if ranks != [index % plan.num_ranks for index in range(plan.num_stages)]:
        raise PlanError(
            f"Megatron-LM places stage i on rank i modulo the ranks, and {plan.schedule} places them otherwise\n"
            "  plan with 1F1B or Interleaved1F1B"
        )
    if plan.num_stages > 1 and plan.num_stages % plan.num_ranks:
        raise PlanError("Megatron-LM needs equally many stages on every rank\n  choose stages as a multiple of ranks")
    parameters = {spec.fqn for spec in graph.specs if spec.parameters}
    order = [(index, name) for index, names in enumerate(parts.modules) for name in names]
    places = [place for place, (_, name) in enumerate(order) if name in blocks]
    _check_ends(
        [row for row in order[: places[0]] if row[1] in parameters],
        [row for row in order[places[0] : places[-1]] if row[1] in parameters - blocks],
        [row for row in order[places[-1] + 1 :] if row[1] in parameters],
        (order[places[-1]][0], plan.num_stages - 1),
    )
    letters = [["t"] * sum(name in blocks for name in names) for names in parts.modules]
    letters[0].insert(0, "E")
    letters[-1].append("L")
    return "\n".join(
        [
            f"--pipeline-model-parallel-size {plan.num_ranks} \\",
            f'--pipeline-model-parallel-layout "{"|".join(map(_run_lengths, letters))}"',
        ]
    )


def _check_ends(
    before: Sequence[tuple[int, str]],
    between: Sequence[tuple[int, str]],
    after: Sequence[tuple[int, str]],
    allowed: tuple[int, int],
) -> None:
    """Refuse what the letters cannot say of modules with parameters around and between the layers.

    Args:
        before: Stage and name of what is called before the first layer.
        between: Of what is called between layers.
        after: Of what is called after the last.
        allowed: Stage of the last layer, where Megatron keeps the final normalisation, and the last stage.
    """
    wrong = [name for stage, name in before if stage != 0]
    wrong += [name for stage, name in after if stage not in allowed]
    wrong += [name for stage, name in after[-1:] if stage != allowed[1]]
    if wrong:
        raise PlanError(
            f"Megatron-LM keeps the embedding on the first stage and the head on the last, and this plan has "
            f"{', '.join(dict.fromkeys(wrong))} elsewhere\n  plan with fewer stages, or use the torchtitan format"
        )
    if between:
        raise PlanError(f"Megatron-LM has no place for {between[0][1]} between layers\n  use the torchtitan format")


def _run_lengths(letters: list[str]) -> str:
    """Write equal neighbours as a product.

    >>> _run_lengths(["E", "t", "t", "t", "L"])
    'Et*3L'
    """
    runs = [(letter, len(list(run))) for letter, run in groupby(letters)]
    return "".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)

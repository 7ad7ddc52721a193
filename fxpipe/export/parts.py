"""Which modules of the model each stage holds: what peers, who cut between modules, can be told."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fxpipe.errors import PlanError
from fxpipe.ir.graph import LayerGraph
from fxpipe.ir.plan import PipelinePlan


@dataclass(frozen=True, slots=True)
class Parts:
    """A model as its stages hold it.

    Attributes:
        modules: For each stage the FQNs of its modules, in the order of calling; a block stands for what is inside.
        blocks: FQNs of the repeated blocks, in the model's order.
        shared: Modules without parameters that several stages run (rotary tables).
    """

    modules: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    shared: tuple[str, ...]


def parts_of(plan: PipelinePlan, graph: LayerGraph, what: str) -> Parts:
    """Sort a plan's layers into modules.

    Args:
        plan: The plan.
        graph: The layers it was made of.
        what: Name of the format, for messages.

    Returns:
        The modules of each stage.

    Raises:
        PlanError: A cut lies inside a block, or a module is called on several stages: a list of modules cannot say it.
    """
    if plan.opened:
        raise PlanError(
            f"{what} cuts between modules, and this plan cuts inside {', '.join(plan.opened)}\n"
            "  plan with grain='block' (--grain block): the nearest plan that it can say"
        )
    found = tuple(_modules(stage.layers, graph) for stage in plan.stages)
    parameters = {spec.fqn for spec in graph.specs if spec.parameters}
    place: dict[str, int] = {}
    for index, names in enumerate(found):
        for name in names:
            if place.setdefault(name, index) != index and name in parameters:
                raise PlanError(
                    f"{what} gives each module one stage, and {name} is called on stages {place[name]} and {index}\n"
                    "  use fewer stages, or a model without a module that is called at several places"
                )
    bare = [info.fqn for spec in graph.specs for info in spec.parameters if not _lies_in(info.fqn, place)]
    if bare:
        raise PlanError(
            f"{what} places modules, and {bare[0]} lies in none: the model itself reads that parameter\n"
            "  put it into a module of its own, or use the json format"
        )
    shared = dict.fromkeys(name for stage in plan.stages for name in _modules(stage.duplicated, graph))
    return Parts(found, _repeated(found), tuple(shared))


def _lies_in(fqn: str, modules: Collection[str]) -> bool:
    """Whether a tensor belongs to one of the modules, or to a module inside of one."""
    owner = fqn
    while owner := owner.rpartition(".")[0]:
        if owner in modules:
            return True
    return False


def _modules(layers: tuple[str, ...], graph: LayerGraph) -> tuple[str, ...]:
    """Give the modules among names of layers; functions between modules go with the module before them."""
    own = {name.partition("@")[0] for name in graph.blocks if name}
    return tuple(dict.fromkeys(fqn for name in layers if (fqn := name.partition("@")[0]) in own))


def _repeated(modules: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """Give the modules that are entries of one list: those whose last part is a number, of the longest such list."""
    lists: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for stage in modules for name in stage):
        owner, _, last = name.rpartition(".")
        if last.isdecimal():
            lists.setdefault(owner, []).append(name)
    longest = max(map(len, lists.values()), default=0)
    return tuple(next((names for names in lists.values() if len(names) == longest), []))


def refuse_ties(plan: PipelinePlan, what: str) -> None:
    """Refuse a plan with tied parameters on several stages.

    Raises:
        PlanError: Names the tie and what can be done.
    """
    for tie in plan.ties:
        if len(tie.stages) > 1:
            raise PlanError(
                f"{what} cannot say that {' = '.join(tie.fqns[:3])} is one parameter on stages "
                f"{', '.join(map(str, tie.stages))}\n"
                "  untie it in the model's config (tie_word_embeddings=False), or use the deepspeed format"
            )

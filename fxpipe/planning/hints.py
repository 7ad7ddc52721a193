"""What a plan does not do by itself, and would help: said in its notes, each computed first."""

from __future__ import annotations

from dataclasses import replace

from fxpipe.errors import PartitionError
from fxpipe.ir.plan import PipelinePlan
from fxpipe.ir.schedule import schedule_named
from fxpipe.planning.settings import Settings, device_limit
from fxpipe.planning.simulation.simulate import simulate


def needs_hint(plan: PipelinePlan) -> bool:
    """Tell whether a plan without a limit needs more than a device has, and recomputation might help."""
    training = plan.training
    if plan.memory_limit is not None or training.recompute not in (None, "auto"):
        return False
    needs: dict[int, int] = {}
    for stage in plan.stages:
        needs[stage.rank] = needs.get(stage.rank, 0) + stage.peak_bytes
    return max(needs.values()) > plan.hardware.memory


def settings_that_fit(settings: Settings) -> Settings:
    """Give the settings under the device's limit, with recomputation chosen, at block grain: that is fast to try."""
    training = replace(settings.training, recompute="auto")
    return replace(settings, training=training, memory_limit=device_limit(settings.hardware), grain="block")


def memory_hint(plan: PipelinePlan, fitting: PipelinePlan | PartitionError) -> str:
    """Say which recomputation would make a plan fit, and what that would cost.

    Args:
        plan: A plan that does not fit.
        fitting: One that does, or why there is none.
    """
    if schedule_named(plan.schedule).splits_backward:
        return f"no recomputation makes it fit: {plan.schedule} splits the backward, and recomputes nothing"
    if not isinstance(fitting, PipelinePlan):
        return f"no recomputation makes it fit: {str(fitting).splitlines()[0]}"
    more = simulate(fitting).step_s / simulate(plan).step_s - 1
    stages = [stage for stage in fitting.stages if stage.recompute]
    count = sum(len(stage.recompute) for stage in stages)
    modules = f"{count} module{'s' if count != 1 else ''}"
    where = f"stage{'s' if len(stages) != 1 else ''} {', '.join(str(stage.index) for stage in stages)}"
    what = f"recomputing {modules} in {where}" if stages else "another cut"
    return f'{what} makes it fit, for a step {100 * more:+.1f} %: Training(recompute="auto"), memory_limit="device"'

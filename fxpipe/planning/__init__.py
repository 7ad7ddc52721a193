"""From a LayerGraph with costs to a PipelinePlan; imports no torch.

In: a ``LayerGraph``, ``LayerCounts`` or measured seconds, ``Settings``. Out: a frozen ``PipelinePlan``. Floors:
``costs`` (seconds, bytes, precision), ``search`` (a graph, nothing of models) and ``simulation`` (a step, action by
action) know nothing of each other; the files here make a ``Layout`` of the first, a partition by the second, and the
plan of both. Never: equal inputs give different bytes, a plan exceeds the memory limit, or a bound is above a plan
that exists.

The types on the way::

    LayerGraph ─┬─ costs.estimate ─► Estimate (LayerCost per layer) ─┐
    Settings ───┴─ costs.memory ───► LayerMemory, Precision ─────────┴─ layout ─► Layout
    Layout.problem: PartitionProblem ── search.partition_nodes ─► Partition ── solve ─► Solution (blocks opened)
    inside search:  PartitionProblem ─ instance ─► Instance;  Placement ─ request ─► Request;  ─► Found, Answer
    Layout + Solution ── plan.make_plan ─► PipelinePlan;  Layout + stages ── judge.step_s ─► seconds of a step
"""

"""The only effects: memory, process groups, forward and backward.

In: a plan, a ``Program`` for each variant, values for this rank's tensors. Out: losses, gradients, states. Floors,
each seeing only those above it here: ``ranks`` (groups, agreement, failures), ``build`` (values and stages), ``run``
(work, engines, exchange, gradients); beside it, on ``build``, ``weights`` (files). Start with ``build.stage``: what a
stage is; then ``run.local``, all of a step on one page. Never: a rank waits for one that has failed; a number depends
on the number of stages.
"""

"""From a model on the meta device to a LayerGraph, and to the FX graphs of its stages.

In: a module or a sequence of specs, and one microbatch as named tensors. Out: a ``LayerGraph`` for planning and,
given a plan's stage of each layer, a ``Program`` for running. Floors, each seeing only those before it here: ``model``
(the copy with fake tensors), ``calls`` (one torch call: its form, result and cost), ``record`` (one forward, seen and
written down), ``graph`` (what of it is needed), ``cut`` (one graph per stage); ``capture`` composes them. Never: the
user's model is changed; a fake tensor leaves; a number differs from what eager would compute without an error.
"""

"""How a batch is named, split, weighed and put together again.

In: the arguments of ``step``. Out: microbatches as named tensors (``Inputs``), their sizes and weights; outputs
merged. Never: a tensor is split that every microbatch needs whole, or a sample is lost.
"""

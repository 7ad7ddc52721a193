"""How a batch is named, split, weighed and put together again.

In: the arguments of ``step``. Out: microbatches as named tensors (``Inputs``), their sizes and weights; outputs
merged. On the way: ``dims`` finds the samples, ``order`` and ``split`` cut, ``inputs`` names, ``weights`` weighs,
``merge`` puts outputs together; ``example`` and ``microbatches`` are for ``compile``. Never: a tensor is split that
every microbatch needs whole, or a sample is lost.
"""

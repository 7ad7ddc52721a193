"""What a layer costs: seconds, bytes, the dtypes it is trained in.

In: a ``LayerGraph`` with counts, ``Hardware``, ``Training``. Out: ``Estimate`` and ``LayerMemory``. ``estimate`` is
the seconds, ``memory`` the bytes; ``recompute``, ``precision`` and ``blocks`` say what both depend on. Never: a cost
is negative, or depends on the machine that plans.
"""

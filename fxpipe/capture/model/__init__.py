"""The copy of the user's model that is captured: fake tensors, the user's own forward functions.

In: a module or a sequence of specs. Out: a ``Skeleton`` and which of its modules are blocks, opened or recorded
whole. ``skeleton`` copies, ``blocks`` chooses, ``sequence`` is for models written by hand, ``huggingface`` and
``builtin`` hold what is known by name or by home, and say why. Never: the user's module is written to, or a tensor
gets memory.
"""

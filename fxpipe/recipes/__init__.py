"""Recipes: how a model's tensors came to their values, written down while its constructor runs without memory.

In: a constructor, run inside ``deferred_init``. Out: tensors without memory that know the operations which fill them,
and the values of any few of them, bit for bit those of a plain build.

What must never break: a value that was replayed equals the eager one, or there is an error; nobody draws the numbers of
tensors that were not asked for; the global generators stand afterwards where a plain build leaves them.

Floors, top down: deferred, recorder, replay, streams, then draws over mersenne, operations, and tape.
"""

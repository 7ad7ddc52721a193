"""Recipes: how a model's tensors came to their values, written down while its constructor runs without memory.

In: a constructor, run inside ``deferred_init``. Out: tensors without memory that know the operations which fill them,
and the values of any few of them, bit for bit those of a plain build.

Never: a value that was replayed differs from the eager one without an error; the numbers of tensors that were not asked
for are drawn; the global generators stand afterwards elsewhere than a plain build leaves them.

Floors, top down: deferred, recorder, replay, streams, then draws over mersenne, operations, and tape.
"""

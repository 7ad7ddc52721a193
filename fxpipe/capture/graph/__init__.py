"""What of a recorded graph is needed, and what it means.

In: an ``Observation``. Out: a ``Structure`` (needed calls, groups, order), the layers that are planned, the summands
of the loss. ``structure`` comes first; ``layers`` is for planning; ``loss`` takes the loss apart and ``proof`` tries
the summands on values, for which ``tail``, ``given`` and ``sizes`` make a small program; ``trace`` is the way without
an example. Never: a write in place loses its order, or a call that has an effect is dropped.
"""

"""What of a recorded graph is needed, and what it means.

In: an ``Observation``. Out: a ``Structure`` (needed calls, groups, order), the layers that are planned, the summands
of the loss. Never: a write in place loses its order, or a call that has an effect is dropped.
"""

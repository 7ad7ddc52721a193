"""One forward, seen and written down as a graph.

In: a skeleton, what is recorded whole, one microbatch. Out: an ``Observation``: the graph with all calls in order,
the guards, the module calls. Never: a call that changes a number goes unrecorded without an error.
"""

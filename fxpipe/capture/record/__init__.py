"""One forward, seen and written down as a graph.

In: a skeleton, what is recorded whole, one microbatch. Out: an ``Observation``: the graph with all calls in order
(each node with its ``NodeInfo``), the guards, the module calls. ``observe`` is the entry; ``calls``, ``modules``,
``bypass``, ``guards`` and ``counts`` see one kind of thing each and share one ``Forward``. Never: a call that changes a
number goes unrecorded without an error.
"""

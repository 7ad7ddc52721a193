"""Where cuts lie along the heaviest path of a graph, and what each then costs at least: marks that stand for all cuts.

In: an ``Instance``. Out: a ``Line`` of marks in a row. A node that does not lie on the path is free only between its
neighbours on it: few nodes are left to choose, and the best choice is a minimum cut. Never: a cut for which no mark
stands.
"""

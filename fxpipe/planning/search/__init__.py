"""The best cut of any graph into stages: the whole of the public ``partition``; nothing of models.

In: a ``PartitionProblem``. Out: a stage for every node and a proven lower bound. ``problem.measure`` says in plain
Python what a partition costs; everything else is numpy over whole numbers. Never: an answer that ``measure`` costs
otherwise, or a bound that some partition beats.
"""

"""A recorded graph cut at the plan's boundaries, and single layers to be measured.

In: a ``Structure`` and the stage of each layer. Out: a ``Program``. ``placement`` says which stage runs what,
``stage_graphs`` writes the graphs. Never: a value is read by a stage that neither computes nor receives it.
"""

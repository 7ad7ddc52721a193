"""A step of a pipeline, played through action by action: when everything happens, without torch.

In: times of the stages and of the messages between them. Out: an ``ir.simulation.Simulation``.
``simulate`` reads a plan; ``engine`` plays the orders of its schedule. All of it is sums and maxima over orders that do
not depend on times. Never: a longer time anywhere makes a step shorter, or equal times give other numbers.
"""

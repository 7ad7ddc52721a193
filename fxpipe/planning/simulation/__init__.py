"""A step of a pipeline, played through action by action: when everything happens, without torch.

In: times of the stages and of the messages between them. Out: an ``ir.simulation.Simulation``. All of it is sums and
maxima over orders that do not depend on times, so a longer time anywhere never makes a step shorter.
"""

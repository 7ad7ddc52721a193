"""From a plan's stage to a module with memory and values.

In: the skeleton, the stage's names, where values come from. Out: a ``StageModule`` under the model's FQNs. Never:
uninitialised memory reaches a computation, or a rank allocates what it does not own.
"""

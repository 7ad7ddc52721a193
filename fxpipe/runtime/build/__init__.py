"""From a plan's stage to a module with memory and values.

In: the skeleton, the stage's names, where values come from. Out: a ``StageModule`` under the model's FQNs. ``values``
says where each value comes from, ``initialize`` runs what makes them, ``stage`` builds the module, ``lower`` turns
its graph into the function that it runs, ``boundary`` what crosses into messages; ``state`` reads and loads it.
Never: uninitialised memory reaches a computation, or a rank allocates what it does not own.
"""

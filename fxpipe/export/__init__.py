"""One plan in the form that other trainers read; imports no torch.

In: a ``PipelinePlan`` and the ``LayerGraph`` it was made of. Out: text: JSON, YAML, a layout string, a Python file, a
drawing. ``export`` knows the formats, one file each; ``parts`` says which modules each stage holds. Never: a file that
makes another trainer cut where the plan does not, or that leaves out a tie without a word.
"""

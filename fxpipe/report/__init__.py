"""What a plan looks like to a person; imports no torch.

In: a ``PipelinePlan`` and its ``Baseline`` rows. Out: text, Markdown, HTML. ``words`` holds what all forms say;
``table`` lays it out as text, ``page`` as HTML. Never: a number that the plan does not hold.
"""

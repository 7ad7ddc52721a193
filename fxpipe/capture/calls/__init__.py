"""One call of torch at a time: how it looks, what it runs on without the model's values, and what it costs.

In: a function and its arguments, fake or real. Out: a form that a graph can hold, a result, counts. Never: a call
changes a tensor of the user's, or draws from the user's random state. Nothing here knows of the graph.
"""

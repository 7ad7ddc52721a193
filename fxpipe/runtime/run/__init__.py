"""Forward and backward of microbatches through stages, by torch's schedules or by a loop.

In: jobs (programs with their inputs and weights). Out: losses, gradients, outputs. Never: a tied gradient is summed
twice or not at all; a microbatch's randomness depends on where it runs.
"""

"""Forward and backward of microbatches through stages, by torch's schedules or by a loop.

In: jobs (programs with their inputs and weights). Out: losses, gradients, outputs. ``work`` is one microbatch in one
stage; ``local`` runs all stages in one process and is the shortest way to read it; ``distributed`` starts torch's
schedules, which call ``engine_stage``, whose messages are ``exchange``'s; ``gradients`` come after. Never: a tied
gradient is summed twice or not at all; a microbatch's randomness depends on where it runs.
"""

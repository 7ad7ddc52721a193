"""Weights on disk: directories read per rank, checkpoints written by all ranks together.

In: a rank's stages, the model's names, a path. Out: the same tensors, in files or from them, under the model's FQNs.
Never: a rank reads or holds what it does not own (but for one tensor that is being converted); a tensor is changed
before everything was checked on every rank; a pickle is read or written; a directory without a whole manifest passes
for a checkpoint.
"""

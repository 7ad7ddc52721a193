"""The only effects: memory, process groups, forward and backward."""

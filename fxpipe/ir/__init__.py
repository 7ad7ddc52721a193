"""Frozen values shared by all rooms; standard library and networkx only."""

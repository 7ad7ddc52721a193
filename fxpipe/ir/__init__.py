"""Frozen values shared by all rooms; standard library and networkx only.

In: numbers, strings, enums, tuples. Out: the same, checked, comparable, with JSON that reads back. The way of a model
goes ``spec``, ``graph``, ``cost``, ``plan``; ``schedule`` and ``orders`` say who works when; ``canonical`` spells
values for fingerprints. Never: a tensor, a module, a device or a process group is held, or anything here changes
after it was made.
"""

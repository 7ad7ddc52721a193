"""Formats: what lies at a path, and how a file is written; nothing here knows a model or other ranks.

In: paths, tensors one at a time. Out: names, shapes and places in files; whole files. Never: a pickle is opened; a name
leads out of its directory; data is read where a header will do.
"""

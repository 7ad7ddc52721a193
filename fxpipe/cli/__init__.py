"""The command line: what a person types before owning a cluster.

In: words of a command line. Out: text on standard output, files written whole, an exit code: 0, 1 where a verification
or comparison failed, 2 for bad input, after one clear line. ``main`` knows the commands, one file each; ``models``
finds the model they are about. Never: torch is imported before a command needs it, or a traceback for bad input.
"""

"""Ranks that work together: groups, agreement before anything is exchanged, word of a failure.

In: the ranks of each pipeline. Out: ``Groups``. ``agreement.agree`` goes before every exchange, ``failures`` around
it: no other file decides whether ranks go on. Never: two ranks create groups in different orders, or go on with
different plans or batches.
"""

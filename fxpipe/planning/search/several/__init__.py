"""Several stages on one rank: what a rank has of one stage counts for its others too.

In: an ``Instance``, a ``Request``, partitions to start with. Out: a partition, a bound of the largest rank load, and
whether it is proven. ``passes`` cuts one order for ranks that are visited in passes; ``pairs`` does so over all
downsets; ``ranks`` takes any placement, memory and ties, and evens stages out. Never: a bound above a partition.
"""

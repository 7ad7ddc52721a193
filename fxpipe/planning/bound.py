"""Lower bounds: what no partition can beat."""

from __future__ import annotations

from fxpipe.planning.instance import Instance
from fxpipe.planning.request import Request


def load_bound(instance: Instance, request: Request) -> int:
    """Give a load that the largest rank load of no partition is below: the largest node, and the mean of all ranks."""
    total = int(instance.load.sum())
    num_ranks = len(set(request.ranks))
    return max(int(instance.load.max()), -(-total // num_ranks))

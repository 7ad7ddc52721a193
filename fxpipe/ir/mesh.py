"""What the names of a mesh's dimensions mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

DATA_DIMENSIONS = ("dp", "dp_replicate", "dp_shard")
"""Names of the dimensions of a mesh along which batches differ."""


def num_replicas(sizes: Mapping[str, int]) -> int:
    """Give the number of data-parallel replicas of a mesh from the sizes of its dimensions.

    >>> num_replicas({"pp": 4, "dp_replicate": 2, "dp_shard": 8}), num_replicas({})
    (16, 1)
    """
    return math.prod(sizes.get(name, 1) for name in DATA_DIMENSIONS)

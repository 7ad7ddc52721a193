"""The logger ``fxpipe``: what long work did and how long it took, on which rank. Silent until a handler is set up.

>>> import logging
>>> logging.getLogger("fxpipe").setLevel(logging.INFO)  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os


def _with_rank(record: logging.LogRecord) -> bool:
    """Give a record its ``rank``, and say it in front of the message where there are several."""
    rank = int(os.environ.get("RANK", "0"))
    record.__dict__["rank"] = rank
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        record.msg = f"rank {rank}: {record.msg}"
    return True


log = logging.getLogger("fxpipe")
"""What every module logs to."""
log.addFilter(_with_rank)

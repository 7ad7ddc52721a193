"""What is asked of the partitioner besides the graph, in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """Number of stages, routing and limits.

    Attributes:
        stages: Most stages, or exactly so many.
        routing: ``"adjacent"`` or ``"direct"``.
        exactly: Whether all stages must be used, none empty.
        memory_limit: Memory units of a rank; None for no limit.
        live: Live microbatches of each stage.
        ranks: Rank of each stage.
    """

    stages: int
    routing: str
    exactly: bool
    memory_limit: int | None
    live: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def paid(self) -> tuple[int, ...]:
        """Whether the boundary before each stage is paid, and after the last; 0 between two stages of one rank."""
        inner = (int(before != after) for before, after in zip(self.ranks[:-1], self.ranks[1:], strict=True))
        return (1, *inner, 1)

    @property
    def one_stage_per_rank(self) -> bool:
        """Whether no rank has two stages."""
        return len(set(self.ranks)) == len(self.ranks)

    @property
    def one_live(self) -> bool:
        """Whether every stage keeps the same number of microbatches."""
        return len(set(self.live)) == 1

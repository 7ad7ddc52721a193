"""What is asked of the partitioner besides the graph, in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxpipe.planning.search.problem import Placement

FREE, NEAR, FAR = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Request:
    """Number of stages, routing and limits.

    Attributes:
        stages: Most stages, or exactly so many.
        routing: ``"adjacent"`` or ``"direct"``.
        exactly: Whether all stages must be used, each with an anchor.
        memory_limit: Memory units of a rank; None for no limit.
        placement: Ranks, live microbatches and links.
        kinds: What the boundary before each stage is, and the one after the last: ``FREE``, ``NEAR`` or ``FAR``.
    """

    stages: int
    routing: str
    exactly: bool
    memory_limit: int | None
    placement: Placement
    kinds: tuple[int, ...]

    @classmethod
    def of(cls, stages: int, routing: str, exactly: bool, memory_limit: int | None, placement: Placement) -> Request:
        """Make a request; boundaries between two stages of one rank are free."""
        ranks = placement.rank_of_stage
        inner = (
            FREE if before == after else FAR if far else NEAR
            for before, after, far in zip(ranks[:-1], ranks[1:], placement.far, strict=True)
        )
        return cls(stages, routing, exactly, memory_limit, placement, (NEAR, *inner, NEAR))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each stage."""
        return self.placement.rank_of_stage

    @property
    def live(self) -> tuple[int, ...]:
        """Most live microbatches of each stage."""
        return self.placement.most_live

    @property
    def one_stage_per_rank(self) -> bool:
        """Whether no rank has two stages."""
        return len(set(self.ranks)) == len(self.ranks)

    @property
    def one_kind(self) -> int | None:
        """The kind of all boundaries, None where they differ."""
        kinds = set(self.kinds[1:-1]) or {NEAR}
        return kinds.pop() if len(kinds) == 1 else None

    def apart(self) -> Request:
        """Give the same request with every stage on a rank of its own; the free boundaries stay free.

        Each rank then holds no more than it held before, so what is impossible here is impossible there.
        """
        return replace(self, placement=Placement.simple(len(self.ranks), live=self.live))

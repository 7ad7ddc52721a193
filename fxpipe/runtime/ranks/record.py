"""Why a pipeline ended: the first thing that a rank says of it, which all ranks then repeat."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

_LONGEST = 900
"""Characters, of up to four bytes."""


@dataclass(frozen=True, slots=True)
class Record:
    """Why a pipeline ended.

    Attributes:
        rank: Whose fault it was; None where it is no single rank's.
        text: In words, naming rank, stage and cause.
        silent: Whether that rank could not say it itself.
        is_farewell: Whether the rank has closed the pipeline: a failure only where others still wait for it.
    """

    rank: int | None
    text: str
    silent: bool = False
    is_farewell: bool = False

    def to_json(self) -> str:
        """Spell it for other ranks; a long text is cut, so that it fits into a status."""
        text = self.text if len(self.text) <= _LONGEST else f"{self.text[:_LONGEST]} …"
        return json.dumps({**asdict(self), "text": text}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """Read what ``to_json`` wrote.

        >>> record = Record(1, "rank 1 (stage 1) failed: ValueError: no")
        >>> Record.from_json(record.to_json()) == record
        True
        """
        found = json.loads(text)
        return cls(found["rank"], str(found["text"]), bool(found["silent"]), bool(found["is_farewell"]))

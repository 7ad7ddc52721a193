"""Where a tensor's first value comes from."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightSource:
    """One tensor of the model.

    Attributes:
        fqn: Its first FQN.
        bytes: Its size.
        source: In words: its own value, a recorded initialisation, what ``init=`` names, or nothing.
        stages: The stages that hold it; none if the loss does not need it.

    >>> WeightSource("lm_head.weight", 2048, "recorded", (0, 3)).stages
    (0, 3)
    """

    fqn: str
    bytes: int
    source: str
    stages: tuple[int, ...]

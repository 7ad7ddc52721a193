"""Every error fxpipe raises on purpose.

Each message says what was wrong and where (FQN, stage, rank, shape) in its first line, what was expected, and what
to do about it. Most classes are also the built-in error a caller would expect, so ``except ValueError`` works too.
"""


class FxpipeError(Exception):
    """Root of all errors raised by fxpipe."""


class SpecError(FxpipeError, TypeError):
    """A ``LayerSpec`` was given something that does not describe a layer, or can no longer build it."""


class CaptureError(FxpipeError, RuntimeError):
    """A model's forward does something that cannot be captured without risking wrong numbers."""


class TieError(FxpipeError, ValueError):
    """Tied parameters contradict each other, for example in shape or dtype."""


class PartitionError(FxpipeError, ValueError):
    """A graph cannot be partitioned as asked: invalid nodes, edges, groups, transfers or number of stages."""


class InfeasibleError(PartitionError):
    """No partition keeps the memory limit; ``least_memory_limit`` (bytes) is the smallest limit that works."""

    def __init__(self, message: str, least_memory_limit: int | None = None) -> None:
        super().__init__(message)
        self.least_memory_limit = least_memory_limit


class PlanError(FxpipeError, ValueError):
    """A plan does not belong to this model, or ranks hold different plans."""


class MaterializeError(FxpipeError, RuntimeError):
    """A tensor has no source for its values, or a stage cannot be allocated."""


class ScheduleError(FxpipeError, ValueError):
    """Schedule, ranks, stages, microbatches or batch size do not fit together."""


class WeightsError(FxpipeError, ValueError):
    """A state dictionary or weight file does not fit the model."""


class NonFiniteError(FxpipeError, ArithmeticError):
    """A layer's output or gradient holds NaN or infinity; ``materialize(debug=True)`` looks for the first."""


class MismatchError(FxpipeError, AssertionError):
    """The pipeline's numbers differ from the unpartitioned model's."""


class TorchVersionError(FxpipeError, RuntimeError):
    """This version of torch does not do what fxpipe relies on; names the versions that do."""


class RankError(FxpipeError, RuntimeError):
    """Another rank failed; names its rank, its stage and the cause."""

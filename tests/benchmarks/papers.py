"""Numbers that papers publish, to hold the simulator against."""

from __future__ import annotations

from typing import NamedTuple

from fxpipe.planning.simulation.engine import StageTimes
from fxpipe.planning.simulation.simulate import simulate_stages


class Profiled(NamedTuple):
    """One row of the zero-bubble paper: profiled times in milliseconds, and the bubble of 1F1B that it gives.

    Source: Qi, Wan, Huang, Lin 2024, Zero Bubble Pipeline Parallelism, arXiv 2401.10241, the tables of profiled times
    and of bubble rates; the bubble is 1 - m (F + B + W) over the longest window of a stage. All twelve rows are those
    that the authors' own script of these tables (``iclr_bubble_rates``) has and prints.
    """

    model: str
    ranks: int
    microbatches: int
    forward: float
    input_grad: float
    weight_grad: float
    message: float
    bubble: float

    def simulated(self) -> float:
        """Give the bubble of 1F1B by the simulator, transfers overlapped with work as the paper has them."""
        times = StageTimes(self.forward, self.input_grad, self.weight_grad, self.message, self.message)
        stages = [times] * self.ranks
        return simulate_stages("1F1B", stages, self.ranks, self.microbatches, overlapped=True).window_bubble


ZERO_BUBBLE = (
    Profiled("1.5B", 8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
    Profiled("1.5B", 8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985),
    Profiled("1.5B", 8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    Profiled("6.2B", 8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347),
    Profiled("6.2B", 8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898),
    Profiled("6.2B", 8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091),
    Profiled("14.6B", 16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    Profiled("14.6B", 16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082),
    Profiled("14.6B", 16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251),
    Profiled("28.3B", 32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646),
    Profiled("28.3B", 32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168),
    Profiled("28.3B", 32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352),
)

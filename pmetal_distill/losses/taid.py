"""TAID: a teacher that starts near the student and moves to the real one. One more row operation a chunk.

The intermediate teacher is `softmax((t teacher + (1 - t) student) / T)` on logits, the student's without
gradient.

References:
    Shing et al. 2025, TAID, arXiv:2501.16937, section 3 and algorithm 1.
"""

import math
from dataclasses import dataclass, replace

from schemas.errors import UsageError


@dataclass(frozen=True, slots=True)
class TaidState:
    """Where the interpolation stands; what a checkpoint keeps.

    Attributes:
        t: share of the real teacher.
        momentum: running mean of the loss's relative decrease.
        previous_loss: of the last update; None before the first.
    """

    t: float
    momentum: float = 0.0
    previous_loss: float | None = None


@dataclass(frozen=True, slots=True)
class TaidSchedule:
    """The adaptive update of the share t: faster while the loss falls, never slower than a straight line.

    Attributes:
        start, end: share of the teacher at the first and the last step.
        rate: largest adaptive increase, alpha in the paper.
        decay: of the momentum, beta in the paper.

    Raises:
        UsageError: a value out of range.
    """

    start: float = 0.4
    end: float = 1.0
    rate: float = 5e-4
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UsageError(f"TAID: 0 <= start < end <= 1 must hold, found {self.start} and {self.end}")
        if not (0 <= self.rate <= 1 and 0 <= self.decay < 1):
            raise UsageError(
                f"TAID: rate must be in [0, 1], decay in [0, 1), found {self.rate}, {self.decay}"
            )

    def initial(self) -> TaidState:
        """The state before the first step."""
        return TaidState(self.start)

    def update(self, state: TaidState, loss: float, *, step: int, num_steps: int) -> TaidState:
        """The state after a step.

        Args:
            state: before.
            loss: of the step.
            step: its number, from 0.
            num_steps: of the whole training.
        """
        if state.previous_loss is None:
            return replace(state, previous_loss=loss)
        decrease = (state.previous_loss - loss) / (state.previous_loss + 1e-15)
        momentum = self.decay * state.momentum + (1 - self.decay) * decrease
        adaptive = self.rate * (1 - state.t) * 0.5 * (1 + math.tanh(momentum / 2))  # the logistic function
        line = self.start + (self.end - self.start) * step / num_steps
        return TaidState(min(self.end, max(line, state.t + adaptive)), momentum, loss)

"""Whether targets stand beside the right tokens, judged by the text: a shift by one shows. Free."""

from dataclasses import dataclass, field

import numpy as np

from schemas.arrays import Bool, Int32

SHIFTS = (-1, 0, 1, 2)
LEAST_ROWS = 200
CLEARLY = 0.1


@dataclass(slots=True, eq=False)
class Alignment:
    """How often the teacher's first choice at row t is the token at t + shift.

    A model of any quality is right about the next token (shift 1) far more often than about the others.
    """

    hits: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SHIFTS, 0))
    rows: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SHIFTS, 0))

    def add(self, first_choice: Int32, token_ids: Int32, documents: Int32, loss_mask: Bool) -> None:
        """Counts the trained rows of a sequence in; `first_choice` int32 [n]."""
        rows = np.flatnonzero(loss_mask)
        for shift in SHIFTS:
            beside = rows + shift
            inside = (beside >= 0) & (beside < len(token_ids))
            here, there = rows[inside], beside[inside]
            same = documents[here] == documents[there]
            self.rows[shift] += int(same.sum())
            self.hits[shift] += int((first_choice[here] == token_ids[there])[same].sum())

    def share(self, shift: int) -> float:
        """Hits of a shift, 0 to 1."""
        return self.hits[shift] / max(1, self.rows[shift])

    def warning(self) -> str | None:
        """A sentence if another shift fits clearly better than the next token."""
        best = max(SHIFTS, key=self.share)
        if self.rows[1] < LEAST_ROWS or self.share(best) < self.share(1) + CLEARLY:
            return None
        return (
            f"the teacher's first choice is the next token in {self.share(1):.0%} of the rows, but the token "
            f"{best - 1:+d} from there in {self.share(best):.0%}: targets and text seem to be shifted"
        )

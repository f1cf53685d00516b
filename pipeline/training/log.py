"""What a run reports: running means of the loss components, speed, waiting."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from schemas.errors import NonFiniteError

if TYPE_CHECKING:
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.losses.chunked_head import LossParts
    from pmetal_distill.teaching import TrainingBatch


@dataclass(slots=True)
class Means:
    """Running means of the loss components since the last report, weighted by tokens."""

    sums: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0

    def add(self, values: Mapping[str, float], tokens: float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * tokens
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / max(self.tokens, 1e-9) for name, total in self.sums.items()}
        self.sums.clear()
        self.tokens = 0.0
        return means


@dataclass(slots=True)
class Totals:
    """Since the run began, over all its processes; evaluation and checkpoints are not in the seconds."""

    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0


@dataclass(slots=True, eq=False)
class RunLog:
    """Collects what the steps say and turns it into reports.

    Attributes:
        last: the last report.
    """

    distiller: "Distiller"
    means: Means = field(default_factory=Means)
    totals: Totals = field(default_factory=Totals)
    last: dict[str, Any] = field(default_factory=dict)

    def add(
        self, iteration: int, parts: "LossParts", batch: "TrainingBatch", *, waited: float, seconds: float
    ) -> None:
        """Adds a step that took `seconds`, of which it `waited` for the batch.

        Raises:
            NonFiniteError: its loss is not a number.
        """
        names = {"loss": parts.total, "soft": parts.soft, "hard": parts.hard}
        if self.distiller.config.hidden_loss is not None:
            names["hidden"] = parts.hidden
        values = {name: cast(float, value.item()) for name, value in names.items()}
        if not np.isfinite(values["loss"]):
            raise NonFiniteError(
                f"iteration {iteration}: the loss must be finite, found {values['loss']} on sequences "
                f"{sequences_of(batch)}; lower the learning rate or look at these rows with 'inspect'"
            )
        tokens = round(cast(float, parts.num_soft.item()))
        self.means.add(values, tokens)
        self.totals.tokens += tokens
        self.totals.waited += waited
        self.totals.seconds += seconds

    def report(self, iteration: int) -> dict[str, Any]:
        """Means since the last report, and totals."""
        totals, update = self.totals, max(self.distiller.updates - 1, 0)
        self.last = {
            "iteration": iteration,
            **self.means.take(),
            "temperature": self.distiller.config.temperature_at(update),
            "alpha": self.distiller.config.alpha_at(update),
            "learning_rate": float(self.distiller.optimizer.learning_rate),
            "tokens": totals.tokens,
            "seconds": totals.seconds,
            "tokens_per_second": totals.tokens / totals.seconds,
            "data_wait_share": totals.waited / totals.seconds,
        }
        return self.last

    @property
    def state(self) -> dict[str, Any]:
        """For a checkpoint: everything, so that the next report is as if the run had never stopped."""
        return {"means": asdict(self.means), "totals": asdict(self.totals), "last": dict(self.last)}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.means = Means(**state["means"])
        self.totals = Totals(**state["totals"])
        self.last = dict(state["last"])


def sequences_of(batch: "TrainingBatch") -> list[int]:
    """Numbers of the sequences in a batch, if it knows them."""
    numbers = getattr(batch, "numbers", None)
    return [] if numbers is None else cast(list[int], numbers.tolist())

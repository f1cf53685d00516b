"""What a run reports: running means of the loss components, speed, waiting."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.settings import TrainSettings
from schemas.errors import NonFiniteError

if TYPE_CHECKING:
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.losses.chunked_head import LossParts
    from pmetal_distill.offline.batch import Batch


@dataclass(slots=True)
class Means:
    """Running means of the loss components since the last report, weighted by tokens."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: float = 0.0

    def add(self, values: Mapping[str, float], tokens: float) -> None:
        for name, value in values.items():
            self.sums[name] += value * tokens
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """The means; starts anew."""
        means = {name: total / max(self.tokens, 1e-9) for name, total in self.sums.items()}
        self.sums.clear()
        self.tokens = 0.0
        return means


@dataclass(slots=True, eq=False)
class RunLog:
    """Collects what the steps say and turns it into reports."""

    settings: TrainSettings
    distiller: "Distiller"
    means: Means = field(default_factory=Means)
    tokens: int = 0
    waited: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, iteration: int, parts: "LossParts", batch: "Batch", *, waited: float) -> None:
        """Adds a step.

        Raises:
            NonFiniteError: its loss is not a number.
        """
        names = {"loss": parts.total, "soft": parts.soft, "hard": parts.hard}
        if self.distiller.config.hidden_loss is not None:
            names["hidden"] = parts.hidden
        values = {name: cast(float, value.item()) for name, value in names.items()}
        _require_finite(values, iteration, batch)
        self.means.add(values, batch.num_trained_tokens)
        self.tokens += batch.num_trained_tokens
        self.waited += waited

    def report(self, iteration: int) -> dict[str, Any]:
        """Means since the last report, and totals."""
        seconds = time.perf_counter() - self.started
        update = max(self.distiller.updates - 1, 0)
        self.last = {
            "iteration": iteration,
            **self.means.take(),
            "temperature": self.distiller.config.temperature_at(update),
            "alpha": self.distiller.config.alpha_at(update),
            "learning_rate": float(self.distiller.optimizer.learning_rate),
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
        }
        return self.last


def _require_finite(values: Mapping[str, float], iteration: int, batch: "Batch") -> None:
    if not np.isfinite(values["loss"]):
        raise NonFiniteError(
            f"iteration {iteration}: the loss must be finite, found {values['loss']} on sequences "
            f"{batch.numbers.tolist()}; lower the learning rate or look at these rows with 'inspect'"
        )

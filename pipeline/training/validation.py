"""Evaluation on held-out sequences while training. Costs a forward pass of the student for each batch.

Leaves training as it was: no random number is drawn, the reader is not moved, dropout is on again afterwards.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.settings import TrainSettings
from pipeline.training.source import Source

if TYPE_CHECKING:
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.offline.batch import Batch

KL_TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True, slots=True, eq=False)
class Validator:
    """Evaluates the student of a run.

    Args:
        settings: of the run; its `steps_per_eval` and `val_batches` count.
        source: gives the held-out batches.
        distiller: holds student and teacher.
    """

    settings: TrainSettings
    source: Source
    distiller: "Distiller"

    def due(self, iteration: int) -> bool:
        """Whether to evaluate after this batch, from 1; never if nothing is held out."""
        every = self.settings.steps_per_eval
        return every > 0 and iteration % every == 0 and len(self.source.split.held_out) > 0

    def run(self) -> dict[str, float]:
        """Means over the held-out tokens; nothing if there are none.

        Returns:
            `val_soft`, `val_hard` and `val_loss`: the divergence, the cross-entropy, and both weighted as in
            training, without a hidden-state loss. Temperature and alpha are those that the run ends with, so
            that values of different times compare. `val_kl@1`, `val_kl@2`: KL(teacher || student) at these
            temperatures, as far as the targets know the teacher. `val_top1`: share of tokens where the
            student's first choice is the teacher's. `val_perplexity` of the text.
        """
        trained = self.distiller.trained
        was_training = trained.training
        trained.eval()
        try:
            sums: dict[str, float] = defaultdict(float)
            for batch in self.source.validation_batches(self.settings.batch_size, self.settings.val_batches):
                for name, value in self._sums(batch).items():
                    sums[name] += value
        finally:
            trained.train(was_training)
        return self._means(sums) if sums["tokens"] else {}

    def _sums(self, batch: "Batch") -> dict[str, float]:
        from pmetal_distill.evaluation import Question, target_rows
        from pmetal_distill.losses.divergences import Divergence

        config = self.distiller.config
        questions = {
            "val_soft": Question(config.divergence, config.temperature_at(self._last_update)),
            **{f"val_kl@{t:g}": Question(Divergence("forward_kl"), t) for t in KL_TEMPERATURES},
        }
        rows = target_rows(
            self.distiller.student,
            self.distiller.teacher,
            batch,
            list(questions.values()),
            chunk_tokens=config.chunk_tokens,
        )
        mask = batch.loss_mask.reshape(-1)
        soft = np.asarray(rows.soft).sum(axis=1, dtype=np.float64)
        return {
            **dict(zip(questions, soft.tolist(), strict=True)),
            "val_hard": float(np.asarray(rows.hard).sum(dtype=np.float64)),
            "val_top1": float((np.asarray(rows.teacher_rank)[mask] < 1).sum()),
            "tokens": float(mask.sum()),
            "labelled": float((batch.labels.reshape(-1)[mask] >= 0).sum()),
        }

    def _means(self, sums: Mapping[str, float]) -> dict[str, float]:
        means = {name: value / sums["tokens"] for name, value in sums.items() if name.startswith("val_")}
        means["val_hard"] = sums["val_hard"] / max(sums["labelled"], 1.0)
        config, last = self.distiller.config, self._last_update
        alpha, temperature = config.alpha_at(last), config.temperature_at(last)
        loss = alpha * temperature**2 * means["val_soft"] + (1 - alpha) * means["val_hard"]
        return {"val_loss": loss, **means, "val_perplexity": float(np.exp(means["val_hard"]))}

    @property
    def _last_update(self) -> int:
        """Number of the run's last optimizer update, from 0."""
        return max(self.settings.iters // self.settings.grad_accumulation_steps - 1, 0)

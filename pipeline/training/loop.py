"""The loop of a run: batches, reports, evaluations, checkpoints. Costs the steps and what is asked for.

Behind each batch, in this order: a report, an evaluation, one line of metrics, a checkpoint. A run that is
stopped anywhere and goes on from its last checkpoint writes the same lines, but for the times in them.
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.console import Console, Progress
from pipeline.settings import TrainSettings
from pipeline.training.checkpoints import Checkpoint, Checkpoints
from pipeline.training.interrupts import Interrupts
from pipeline.training.log import RunLog
from pipeline.training.reporting import Metrics

if TYPE_CHECKING:
    from pipeline.training.compiling import CompilingAhead
    from pipeline.training.source import Source
    from pipeline.training.validation import Validator
    from pmetal_distill.distiller import Distiller
    from pmetal_distill.offline.batches import BatchIterator


@dataclass(slots=True, eq=False)
class Loop:
    """Trains from `iteration` on.

    Attributes:
        content: names and hashes of what the run is made from, and the settings that decide: for checkpoints.
        iteration: batches trained so far.
        saved: the iteration of the last checkpoint.
        best: iteration and value of the best evaluation.
        evaluation: the last one.
    """

    settings: TrainSettings
    source: "Source"
    distiller: "Distiller"
    validator: "Validator"
    checkpoints: Checkpoints
    content: Mapping[str, Any]
    log: RunLog
    iteration: int = 0
    saved: int = 0
    best: tuple[int, float] | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    reader: dict[str, Any] | None = None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes over a checkpoint.

        Raises:
            CheckpointError: of other weights.
        """
        import mlx.core as mx

        self.distiller.state = checkpoint.state
        mx.eval(self.distiller.state.arrays)
        record = checkpoint.state.record
        self.iteration = self.saved = checkpoint.iteration
        self.log.state = record["log"]
        self.best = None if record["best"] is None else (record["best"][0], record["best"][1])
        self.evaluation, self.reader = dict(record["evaluation"]), record["reader"]

    def run(self, metrics: Metrics, console: Console, compiling: "CompilingAhead | None" = None) -> None:
        """Trains to the end; goes over to compiled steps when their kernels have been built.

        Raises:
            KeyboardInterrupt: asked to stop; there is a checkpoint behind the last batch.
            NonFiniteError: the loss or the weights stopped being numbers.
            CheckpointError: the disk is full or fails.
        """
        settings = self.settings
        world = self.distiller.world
        batches = self.source.batches(
            batch_size=settings.batch_size,
            seed=settings.seed,
            state=self.reader,
            prefetch=settings.prefetch,
            rank=world.rank,
            world_size=world.size,
        )
        with (
            batches,
            ExitStack() as stack,
            Interrupts() as interrupts,
            console.progress("training", total=settings.iters, unit="steps") as progress,
        ):
            if compiling is not None:
                stack.callback(compiling.stop)
            progress.advance(self.iteration)
            stopping = False
            while self.iteration < settings.iters and not (stopping := world.any(interrupts.asked)):
                if compiling is not None and compiling.look():
                    console.note(f"compiled steps from batch {self.iteration + 1:,} on")
                self._step(batches)
                improved = self._tell(metrics, progress)
                progress.advance(1)
                if self._save_due(improved):
                    self._save(batches, metrics)
            if self.iteration > self.saved and (stopping or settings.save_every):
                self._save(batches, metrics)
        if self.iteration < settings.iters:
            raise KeyboardInterrupt(
                f"stopped behind batch {self.iteration:,} of {settings.iters:,}, its checkpoint is written; "
                f"go on with 'pmetal-pipeline train -c {settings.out / 'config.yaml'} --resume'"
            )

    def _step(self, batches: "BatchIterator") -> None:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        parts = self.distiller.step(batch, upcoming=batches.peek())
        self.iteration += 1
        self.log.add(self.iteration, parts, batch, waited=waited, seconds=time.perf_counter() - started)

    def _tell(self, metrics: Metrics, progress: Progress) -> bool:
        """Reports and evaluates where it is due; whether the student is better than ever."""
        report: dict[str, Any] = {}
        evaluation: dict[str, float] = {}
        if self.iteration % self.settings.steps_per_report == 0 or self.iteration == self.settings.iters:
            report = self.log.report(self.iteration)
            progress.tell(" ".join(f"{name} {report[name]:.3f}" for name in ("loss", "soft", "hard")))
        if self.validator.due(self.iteration):
            evaluation = self.evaluation = self.validator.run()
        if report or evaluation:
            metrics.write(self.iteration, report, evaluation)
        return bool(evaluation) and self._improved(evaluation)

    def _improved(self, evaluation: Mapping[str, float]) -> bool:
        value = criterion(evaluation)
        if value is None or (self.best is not None and value >= self.best[1]):
            return False
        self.best = self.iteration, value
        return True

    def _save_due(self, improved: bool) -> bool:
        every = self.settings.save_every
        return every > 0 and (improved or self.iteration % every == 0)

    def _save(self, batches: "BatchIterator", metrics: Metrics) -> None:
        from pmetal_distill.checkpoint import TrainingState

        self.saved = self.iteration
        if not self.distiller.world.leads:
            return
        metrics.flush()
        state = self.distiller.state
        record = {
            **state.record,
            **self.content,
            "log": self.log.state,
            "best": self.best,
            "evaluation": {name: v for name, v in self.evaluation.items() if math.isfinite(v)},
            "reader": batches.get_state(),
        }
        best = None if self.best is None else self.best[0]
        self.checkpoints.save(self.iteration, TrainingState(state.arrays, record), best=best)


def criterion(evaluation: Mapping[str, float]) -> float | None:
    """What "best" means: the held-out KL at the lowest temperature there is, else the loss."""
    names = [name for name in evaluation if name.startswith("val_kl@")]
    value = evaluation.get(min(names, key=lambda n: float(n.partition("@")[2])) if names else "val_loss")
    return value if value is not None and math.isfinite(value) else None

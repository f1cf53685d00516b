"""The loop of stage one: teacher states in, committed shards out."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.calibration import Calibrator
from pipeline.console import Console, Progress
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.arrays import TargetArrays
from schemas.codebook import Codebook
from schemas.errors import NonFiniteError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.calibrate import DriftMonitor
    from pmetal_distill.offline.capture import CoordinateMap
    from pmetal_distill.offline.writer import CacheWriter, CapturedSequence


@dataclass(slots=True, eq=False)
class StageOne:
    """One process's share of a cache.

    Args:
        settings: of the stage.
        teacher: the loaded teacher.
        data: packed text.
        writer: where shards go.
        console: where progress goes.
    """

    settings: CacheSettings
    teacher: "LoadedModel"
    data: PackedDataset
    writer: "CacheWriter"
    console: Console
    tokens: int = 0
    seconds: float = 0.0
    _runner: TeacherRunner = field(init=False)
    _calibrator: Calibrator = field(init=False)

    def __post_init__(self) -> None:
        hidden = self.writer.dataset.hidden
        self._runner = TeacherRunner(
            self.teacher, self.data, self.settings.batch_size, hidden.layers if hidden else ()
        )
        self._calibrator = Calibrator(
            self.settings, self.teacher, self._runner, self.writer.dataset.target, self.console
        )

    def write_missing(self) -> None:
        """Writes every shard that nobody has committed."""
        missing = self.writer.missing_shards()
        if not missing:
            return
        started = time.perf_counter()
        coding = self._learn()
        total = sum(self._num_tokens(shard) for shard in missing)
        with self.console.progress("caching", total=total, unit="tokens") as progress:
            for shard in missing:
                self._write_shard(shard, coding, progress)
        self.seconds = time.perf_counter() - started

    def _learn(self) -> "DriftMonitor | Codebook":
        """What the whole data set is coded with: the same in every run and for every worker."""
        if self.writer.dataset.target.tail == "sketch":
            return self._calibrator.monitor()
        return self._calibrator.codebook()

    def _write_shard(self, shard: int, coding: "DriftMonitor | Codebook", progress: Progress) -> None:
        numbers = self.writer.dataset.shard_range(shard)
        if isinstance(coding, Codebook):
            self.writer.write_shard(shard, self._sequences(numbers, None, progress), codebook=coding)
            return
        chosen = self._calibrator.of_shard(coding, numbers)
        measured = {
            f"{name}@{temperature:g}": getattr(error, name)
            for temperature, error in chosen.error.items()
            for name in ("gradient", "kl", "total_variation")
        }
        self.writer.write_shard(
            shard,
            self._sequences(numbers, chosen.map, progress),
            basis=chosen.basis,
            codebook=chosen.codebook,
            measured={**measured, "refitted": float(chosen.basis is not coding.calibration.basis)},
        )
        if chosen.basis is not coding.calibration.basis:
            self.console.note(f"shard {shard}: its text is unlike the sample, so it has a basis of its own")

    def summary(self) -> dict[str, Any]:
        """What this process has written."""
        return {
            "new_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }

    def _num_tokens(self, shard: int) -> int:
        numbers = self.writer.dataset.shard_range(shard)
        return int(self.data.sequence_lengths()[numbers.start : numbers.stop].sum())

    def _sequences(
        self, numbers: range, sketch: "CoordinateMap | None", progress: Progress
    ) -> Iterator["CapturedSequence"]:
        from pmetal_distill.offline.writer import CapturedSequence

        for states in self._runner.run(numbers):
            length = len(states.token_ids)
            yield CapturedSequence(
                states.token_ids,
                states.documents - states.documents.min(),
                states.loss_mask,
                self._targets(states, sketch),
                states.layers,
            )
            self.tokens += length
            progress.advance(length)

    def _targets(self, states: TeacherStates, sketch: "CoordinateMap | None") -> TargetArrays:
        """Targets of every position of a sequence; zeros where the prediction is not trained."""
        captured = self._capture(states, sketch)
        targets = TargetArrays.empty(
            len(states.token_ids), k=captured.k, num_nodes=captured.num_nodes, rank=captured.rank
        )
        for whole, part in zip(targets.parts(), captured.parts(), strict=True):
            whole[states.loss_mask] = part
        return targets

    def _capture(self, states: TeacherStates, sketch: "CoordinateMap | None") -> TargetArrays:
        """Targets of the trained positions, their logits made and dropped chunk by chunk."""
        from pmetal_distill.offline.capture import capture_hidden

        try:
            return capture_hidden(
                states.final,
                self.teacher.logits if self.teacher.splits else lambda logits: logits,
                self.writer.dataset.target,
                sketch=sketch,
                chunk=self.settings.head_chunk,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"sequence {states.number}: {error}") from error

"""The loop of stage one: teacher states in, committed shards out."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.console import Console, Progress
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.arrays import TargetArrays

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
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

    def __post_init__(self) -> None:
        hidden = self.writer.dataset.hidden
        self._runner = TeacherRunner(
            self.teacher, self.data, self.settings.batch_size, hidden.layers if hidden else ()
        )

    def write_missing(self) -> None:
        """Writes every shard that nobody has committed."""
        missing = self.writer.missing_shards()
        total = sum(self._num_tokens(shard) for shard in missing)
        started = time.perf_counter()
        with self.console.progress("caching", total=total, unit="tokens") as progress:
            for shard in missing:
                self.writer.write_shard(shard, self._sequences(shard, progress))
        self.seconds = time.perf_counter() - started

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

    def _sequences(self, shard: int, progress: Progress) -> Iterator["CapturedSequence"]:
        from pmetal_distill.offline.writer import CapturedSequence

        for states in self._runner.run(self.writer.dataset.shard_range(shard)):
            length = len(states.token_ids)
            yield CapturedSequence(
                states.token_ids,
                states.documents - states.documents[0],
                states.loss_mask,
                self._targets(states),
                states.layers,
            )
            self.tokens += length
            progress.advance(length)

    def _targets(self, states: TeacherStates) -> TargetArrays:
        spec = self.writer.dataset.target
        targets = TargetArrays.empty(len(states.token_ids), k=spec.k, num_nodes=spec.num_nodes, rank=0)
        rows = np.flatnonzero(states.loss_mask)
        chunk = self.settings.head_chunk
        for start in range(0, len(rows), chunk):
            captured = self._capture(states.final[start : start + chunk])
            for whole, part in zip(targets.parts(), captured.parts(), strict=True):
                whole[rows[start : start + chunk]] = part
        return targets

    def _capture(self, states: Any) -> TargetArrays:
        import mlx.core as mx

        from pmetal_distill.kernels import capture

        spec = self.writer.dataset.target
        logits = self.teacher.logits(states) if self.teacher.splits else states
        found = capture(logits, k=spec.k, nodes=spec.curve_nodes)
        mx.eval(found)
        return TargetArrays(
            np.array(found.ids),
            np.array(found.scores - found.lse[:, None]),
            np.array(found.curve),
            np.zeros((len(states), 0), np.float32),
        )

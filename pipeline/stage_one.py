"""The loop of stage one: teacher states in, committed shards out."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.calibration import CODEBOOK_TOKENS, Sample
from pipeline.console import Console, Progress
from pipeline.data import PackedDataset
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.arrays import TargetArrays
from schemas.basis import SketchBasis
from schemas.codebook import Codebook
from schemas.errors import NonFiniteError

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.writer import CacheWriter, CapturedSequence


@dataclass(frozen=True, slots=True)
class Sidecars:
    """What the targets of a shard are coded with."""

    basis: SketchBasis | None
    codebook: Codebook


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
        if not missing:
            return
        sidecars = self._sidecars()
        total = sum(self._num_tokens(shard) for shard in missing)
        started = time.perf_counter()
        with self.console.progress("caching", total=total, unit="tokens") as progress:
            for shard in missing:
                self.writer.write_shard(shard, self._sequences(shard, progress), codebook=sidecars.codebook)
        self.seconds += time.perf_counter() - started

    def _sidecars(self) -> Sidecars:
        """Those of the shards that are there, else made from a sample of the data."""
        basis, codebook, _ = self.writer.last_sidecars()
        if codebook is not None:
            return Sidecars(basis, codebook)
        started = time.perf_counter()
        sample = Sample(min(CODEBOOK_TOKENS, self.data.num_targets), self.settings.seed)
        with self.console.progress("calibrating", total=sample.num_tokens, unit="tokens") as progress:
            parts = []
            for states in sample.states(self._runner):
                parts.append(self._capture(states))
                progress.advance(len(states.final))
        codebook = Codebook.fit(TargetArrays.concatenate(parts), self.writer.dataset.target)
        self.seconds += time.perf_counter() - started
        return Sidecars(None, codebook)

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
        """Targets of every position of a sequence; zeros where the prediction is not trained."""
        captured = self._capture(states)
        targets = TargetArrays.empty(
            len(states.token_ids), k=captured.k, num_nodes=captured.num_nodes, rank=captured.rank
        )
        for whole, part in zip(targets.parts(), captured.parts(), strict=True):
            whole[states.loss_mask] = part
        return targets

    def _capture(self, states: TeacherStates) -> TargetArrays:
        """Targets of the trained positions, their logits made and dropped chunk by chunk."""
        from pmetal_distill.offline.capture import capture_hidden

        try:
            return capture_hidden(
                states.final,
                self.teacher.logits if self.teacher.splits else lambda logits: logits,
                self.writer.dataset.target,
                chunk=self.settings.head_chunk,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"sequence {states.number}: {error}") from error

"""What stage one learns from samples: the sketch's basis, the codebook, whether a shard's text has drifted.

The calibration sample is spread over the whole data set. Where it would be a good part of the data, all of it
is read and the teacher's states are kept for the main pass, so that calibration costs no second forward pass.
Every shard is then judged by a sample of its own. All of it is a pure function of the settings and the data,
so a resumed run and several workers come to the same.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.spec import TargetSpec

if TYPE_CHECKING:
    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.calibrate import Calibration, DriftMonitor, Sample
    from schemas.codebook import Codebook

CODEBOOK_TOKENS = 4096
KEEP_ALL_FACTOR = 3
HELD_BACK_SHARE = 8
HELD_BACK_TOKENS = 1024
SHARD_TOKENS = 2048
SHARD_HELD_BACK_TOKENS = 256
LEAST_HELD_BACK_TOKENS = 32


@dataclass(slots=True, eq=False)
class Calibrator:
    """Makes the sidecars of a cache.

    Args:
        settings: of the stage.
        teacher: the loaded teacher.
        runner: feeds it.
        spec: of the targets.
        console: where progress goes.
    """

    settings: CacheSettings
    teacher: "LoadedModel"
    runner: TeacherRunner
    spec: TargetSpec
    console: Console

    def codebook(self) -> "Codebook":
        """The codebook alone, for targets without a sketch."""
        from pmetal_distill.offline.capture import capture_hidden
        from schemas.codebook import Codebook

        rows = self._rows(min(CODEBOOK_TOKENS, self.runner.dataset.num_targets))
        return Codebook.fit(
            capture_hidden(rows.states, self._logits_of, self.spec, chunk=self.settings.head_chunk), self.spec
        )

    def monitor(self) -> "DriftMonitor":
        """The calibration of the whole data set, and the judge of its shards."""
        from pmetal_distill.offline.calibrate import DriftMonitor, calibrate

        rows = self._rows(self.settings.calibration_tokens)
        sample, held_back = self._split(rows, most=HELD_BACK_TOKENS)
        calibration = calibrate(
            sample,
            held_back,
            self.spec,
            rank=self.settings.sketch_rank,
            step=self.settings.sketch_step,
            head=self.teacher.head,
        )
        return DriftMonitor(calibration, self.teacher.head)

    def of_shard(self, monitor: "DriftMonitor", sequences: Sequence[int]) -> "Calibration":
        """The calibration that a shard uses, with the errors measured on its own text."""
        starts = sorted({self.runner.batch_of(number).start for number in sequences})
        lengths = self.runner.dataset.sequence_lengths()
        batches = max(1, round(len(starts) * SHARD_TOKENS / max(1, int(lengths[list(sequences)].sum()))))
        chosen = [starts[i] for i in np.linspace(0, len(starts) - 1, min(batches, len(starts))).astype(int)]
        self.runner.keep_tokens = max(self.runner.keep_tokens, 4 * SHARD_TOKENS)
        members = [n for n in sequences if self.runner.batch_of(n).start in set(chosen)]
        rows = SampledRows.of(self.runner.run(members, keep=True))
        sample, held_back = self._split(rows, most=SHARD_HELD_BACK_TOKENS)
        if len(held_back) < LEAST_HELD_BACK_TOKENS or len(sample) < LEAST_HELD_BACK_TOKENS:
            return monitor.calibration
        return monitor.choose(sample, held_back)

    def _rows(self, num_tokens: int) -> "SampledRows":
        """A sample of the data set, evenly spread."""
        data = self.runner.dataset
        if KEEP_ALL_FACTOR * num_tokens >= data.num_targets:
            self.runner.keep_tokens = data.num_targets
            found: Iterable[TeacherStates] = self.runner.run(range(data.num_sequences), keep=True)
            total = data.num_targets
        else:
            found = self.runner.sample(data.sample_sequences(num_tokens, seed=self.settings.seed).tolist())
            total = num_tokens
        with self.console.progress("calibrating", total=total, unit="tokens") as progress:

            def watched() -> Iterable[TeacherStates]:
                for states in found:
                    progress.advance(len(states.final))
                    yield states

            rows = SampledRows.of(watched())
        return rows[np.linspace(0, len(rows) - 1, min(num_tokens, len(rows))).astype(int)]

    def _split(self, rows: "SampledRows", *, most: int) -> tuple["Sample", "Sample"]:
        """Rows to fit on and, of other documents, at most `most` rows to measure on."""
        apart = np.isin(rows.documents, np.unique(rows.documents)[HELD_BACK_SHARE - 1 :: HELD_BACK_SHARE])
        if not apart.any():  # too few documents to set one apart: the end of the sample is the next best
            apart = np.arange(len(rows)) >= len(rows) - len(rows) // HELD_BACK_SHARE
        return self._sample(rows[~apart]), self._sample(rows[apart]).thinned(most)

    def _sample(self, rows: "SampledRows") -> "Sample":
        from pmetal_distill.offline.calibrate import Sample

        return Sample(rows.states, self._logits_of, self.settings.head_chunk, token_ids=rows.token_ids)

    def _logits_of(self, states: Any) -> Any:
        return self.teacher.logits(states) if self.teacher.splits else states


@dataclass(frozen=True, slots=True, eq=False)
class SampledRows:
    """Trained positions of sampled sequences.

    Attributes:
        states: float32 [n, d], final hidden states.
        token_ids: int32 [n], the input token.
        documents: int32 [n], its document.
    """

    states: NDArray[np.float32]
    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]

    @staticmethod
    def of(found: Iterable[TeacherStates]) -> "SampledRows":
        """Copies what is needed of each sequence."""
        from pmetal_distill.offline.capture import as_numpy

        parts = [
            (np.array(as_numpy(s.final)), s.token_ids[s.loss_mask], s.documents[s.loss_mask]) for s in found
        ]
        return SampledRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> "SampledRows":
        return SampledRows(self.states[rows], self.token_ids[rows], self.documents[rows])

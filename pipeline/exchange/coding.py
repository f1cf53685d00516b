"""Sidecars of an import: the codebook, and for dense logits the sketch, fitted on a sample of its rows.

Costs a second look at some rows; of dense logits at most `SAMPLE_BYTES` are in memory at once.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.calibration import CODEBOOK_TOKENS, HELD_BACK_TOKENS, Coding, held_apart
from pipeline.console import Console
from pipeline.exchange.plan import Plan
from pipeline.exchange.sequences import Heads, Logits, Source
from pipeline.exchange.settings import ImportSettings
from pipeline.exchange.survey import Survey
from pipeline.exchange.targets import head_targets
from schemas.codebook import Codebook

if TYPE_CHECKING:
    from pmetal_distill.offline.sample import Sample

SAMPLE_BYTES = 2 << 30


def learn(settings: ImportSettings, source: Source, survey: Survey, plan: Plan, console: Console) -> Coding:
    """The coding of a source, a pure function of source and settings.

    Raises:
        UsageError: fewer rows than the sketch's rank.
        NonFiniteError: NaN or infinity in the sample.
    """
    from pmetal_distill.offline.writer import Sidecars

    spec = plan.spec
    if settings.format != "dense":
        heads = _long_enough(survey.sample.heads(), spec.k, plan)
        return Coding(Sidecars(codebook=Codebook.fit(head_targets(heads, spec)[0], spec)))
    from pmetal_distill.offline.calibrate import calibrate
    from pmetal_distill.offline.capture import capture

    wanted = settings.calibration_tokens if spec.tail == "sketch" else CODEBOOK_TOKENS
    possible = SAMPLE_BYTES // (4 * spec.vocab_size)
    rows = sample_rows(source, survey, min(wanted, possible))
    if spec.tail != "sketch":
        return Coding(Sidecars(codebook=Codebook.fit(capture(rows.logits, spec), spec)))
    if possible < min(wanted, survey.num_targets):
        console.note(
            f"calibrating on {len(rows.logits):,} positions, which is what {SAMPLE_BYTES >> 30} GiB hold"
        )
    sample, held_back = _split(rows)
    found = calibrate(sample, held_back, spec, rank=settings.sketch_rank, step=settings.sketch_step)
    return Coding(Sidecars(found.basis, found.codebook), found.map, found.measured())


@dataclass(frozen=True, slots=True, eq=False)
class SampledLogits:
    """Rows spread over a source.

    Attributes:
        logits: float32 [n, V].
        token_ids: int32 [n], the input tokens.
        sequences: int64 [n], the sequences they are of.
    """

    logits: npt.NDArray[np.float32]
    token_ids: npt.NDArray[np.int32]
    sequences: npt.NDArray[np.int64]

    def __getitem__(self, rows: Any) -> "SampledLogits":
        return SampledLogits(self.logits[rows], self.token_ids[rows], self.sequences[rows])


def sample_rows(source: Source, survey: Survey, count: int) -> SampledLogits:
    """At most `count` trained rows of dense logits, evenly spread."""
    count = max(1, min(count, survey.num_targets))
    wanted = np.linspace(0, survey.num_targets - 1, count).astype(np.int64)
    logits = np.empty((count, survey.vocab_size), np.float32)
    token_ids, sequences = np.empty(count, np.int32), np.empty(count, np.int64)
    seen = 0
    for number, sequence in enumerate(source.sequences()):
        assert isinstance(sequence.said, Logits)
        rows = np.flatnonzero(sequence.loss_mask)
        place = slice(*np.searchsorted(wanted, [seen, seen + len(rows)]))
        chosen = rows[wanted[place] - seen]
        if len(chosen):
            logits[place] = sequence.said.rows(chosen)
            token_ids[place], sequences[place] = sequence.token_ids[chosen], number
        seen += len(rows)
    return SampledLogits(logits, token_ids, sequences)


def _split(rows: SampledLogits) -> tuple["Sample", "Sample"]:
    """Rows to fit on and, of other sequences where there are several, rows to measure on."""
    from pmetal_distill.offline.sample import Sample

    apart = held_apart(rows.sequences)

    def sample(part: SampledLogits) -> "Sample":
        return Sample(part.logits, lambda logits: logits, token_ids=part.token_ids)

    return sample(rows[~apart]), sample(rows[apart]).thinned(HELD_BACK_TOKENS)


def _long_enough(heads: Heads, k: int, plan: Plan) -> Heads:
    if plan.spec.tail == "none":
        return heads
    kept = heads.counts >= k
    return replace(heads, ids=heads.ids[kept], logprobs=heads.logprobs[kept])

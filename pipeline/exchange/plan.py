"""What an import will store: head size, tail, and in words what is lost. Decided after the survey.

Rows may have different numbers of entries. With a tail all need k, so k is what 99 of 100 rows have and the
others lose their target. Without one short rows can be filled up, so k is what one row in ten has.
"""

import json
from dataclasses import dataclass

from pipeline.exchange.sequences import Source
from pipeline.exchange.settings import ImportSettings
from pipeline.exchange.survey import Survey
from pipeline.exchange.targets import ONE_NODE
from schemas.errors import UsageError
from schemas.spec import DEFAULT_NODES, TargetSpec

DENSE_TOP_K = 16
NEARLY_ALL = 0.99
SOME = 0.1


@dataclass(frozen=True, slots=True)
class Plan:
    """How a source is kept.

    Attributes:
        spec: layout of the targets.
        rows_dropped: rows with fewer entries than the head, which a tail cannot stand.
        lost: what the cache does not know of the teacher, a sentence.
    """

    spec: TargetSpec
    rows_dropped: int
    lost: str

    def codec(self, settings: ImportSettings) -> str:
        """For the fingerprint: all that changes the stored targets."""
        values: dict[str, object] = {"import": settings.format, "rows_dropped": self.rows_dropped}
        if self.spec.tail == "sketch":
            values |= {
                "rank": settings.sketch_rank,
                "step": settings.sketch_step,
                "calibration_tokens": settings.calibration_tokens,
            }
        return json.dumps(values)


def make_plan(settings: ImportSettings, source: Source, survey: Survey) -> Plan:
    """The plan for a surveyed source.

    Raises:
        UsageError: a tail or head that the source cannot fill.
    """
    if settings.format == "dense":
        return _dense(settings, survey)
    tail = settings.tail or ("bucket" if source.mass_known else "none")
    if tail == "none":
        return _renormalised(settings, source, survey)
    if not source.mass_known:
        raise UsageError(
            f"tail: must be 'none' for {settings.format} data of this kind, whose probabilities come without "
            "their total, found 'bucket'; leave --tail out"
        )
    most = min(survey.widest, survey.vocab_size - 1)
    k = _head_size(settings.top_k or min(survey.entries_of(NEARLY_ALL), most), most)
    below = survey.rows_below(k)
    lost = (
        "nothing at T=1 but the tail's shape; above T=1 the tail's mass is interpolated between T=1 and "
        "infinity and comes out too large"
    )
    return Plan(TargetSpec(survey.vocab_size, k=k, tail="bucket", curve_nodes=ONE_NODE), below, lost)


def _renormalised(settings: ImportSettings, source: Source, survey: Survey) -> Plan:
    most = survey.widest
    k = _head_size(settings.top_k or survey.entries_of(SOME), most)
    spec = TargetSpec(survey.vocab_size, k=k, tail="none")
    if source.mass_known:
        outside = max(0.0, 1 - survey.mass / survey.num_targets)
        return Plan(
            spec,
            0,
            f"the tail: {outside:.1%} of the mass at T=1 in the mean, more above T=1; heads are renormalised",
        )
    return Plan(
        spec, 0, f"the tail: probabilities are over the {most} listed tokens, the total was never recorded"
    )


def _dense(settings: ImportSettings, survey: Survey) -> Plan:
    tail = settings.tail or "sketch"
    most = survey.vocab_size - (tail != "none")
    k = _head_size(settings.top_k or min(DENSE_TOP_K, most), most)
    nodes = () if tail == "none" else DEFAULT_NODES
    lost = {
        "none": "the tail; heads are renormalised",
        "bucket": "the tail's shape; its mass is known at every temperature from 1 up",
        "sketch": "what the tail's sketch does not hold, as measured",
    }[tail]
    return Plan(TargetSpec(survey.vocab_size, k=k, tail=tail, curve_nodes=nodes), 0, lost)


def _head_size(wanted: int, most: int) -> int:
    if wanted > most:
        raise UsageError(
            f"top_k: must be at most {most}, which is what the source has, found {wanted}; give less"
        )
    return wanted

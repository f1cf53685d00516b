"""`import`: files of other tools to a cache. Reads the source twice, hashes it once; memory is a row group.

The first pass checks everything and counts; the second writes shard after shard, so that an interrupted
import goes on with --resume. Nothing here knows the format: `CacheWriter` writes.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cache import ROWS_PER_GROUP, describe_cache, refuse_used_folder, tokenizer_files
from pipeline.calibration import Coding
from pipeline.console import Console, Progress
from pipeline.exchange import UNVERIFIED
from pipeline.exchange.alignment import Alignment
from pipeline.exchange.coding import learn
from pipeline.exchange.opening import open_source
from pipeline.exchange.plan import Plan, make_plan
from pipeline.exchange.sequences import Heads, Logits, Source, SourceSequence
from pipeline.exchange.settings import ImportSettings
from pipeline.exchange.survey import Survey, survey
from pipeline.exchange.targets import Corrections, head_targets
from schemas.arrays import Bool, TargetArrays
from schemas.errors import DataError, ModelError, NonFiniteError, UsageError
from schemas.manifest import Dataset

if TYPE_CHECKING:
    from pmetal_distill.offline.writer import CacheWriter, CapturedSequence

CHUNK = 256
FEW = "positions with too few entries for the head"


def run_import(settings: ImportSettings, console: Console) -> dict[str, Any]:
    """Makes or completes a cache out of a source.

    Returns:
        what was found, what was lost, and size and cost of the cache.

    Raises:
        UsageError: the output folder is in use, or the options do not fit the source.
        DataError: something in the source, with its place.
        FingerprintError: `resume` into a cache of other inputs.
        NonFiniteError, ModelError, CacheError: as their names say; what was committed stays.
    """
    from pmetal_distill.models import load_tokenizer
    from pmetal_distill.offline.writer import CacheWriter

    refuse_used_folder(settings.out, resume=settings.resume)
    tokenizer = load_tokenizer(settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    source = open_source(settings, tokenizer)
    before = _states(source)
    found = survey(source, vocabulary_size(settings, source, tokenizer), console)
    plan = make_plan(settings, source, found)
    dropped = {**source.dropped, FEW: plan.rows_dropped}
    dropped = {what: count for what, count in dropped.items() if count}
    for what, count in dropped.items():
        console.note(f"left out: {count:,} {what}")
    console.note(f"top {plan.spec.k}, tail '{plan.spec.tail}'; lost: {plan.lost}")
    dataset = describe(settings, source, found, plan, tokenizer)
    with CacheWriter.create_or_resume(settings.out, dataset, tokenizer_files(tokenizer)) as writer:
        run = Import(settings, source, found, plan, writer, console)
        run.write_missing()
    if _states(source) != before:
        raise DataError(f"{settings.source}: must not change while it is read; import it again")
    if warning := run.alignment.warning():
        console.note(f"warning: {warning}")
    return {
        "imported_from": settings.format,
        "top_k": plan.spec.k,
        "tail": plan.spec.tail,
        "lost": plan.lost,
        "dropped": dropped,
        **run.summary(),
        **describe_cache(settings.out),
    }


def vocabulary_size(settings: ImportSettings, source: Source, tokenizer: Any) -> int:
    """V: of dense logits their width, else as given, as config.json says, or as the tokenizer needs.

    Raises:
        UsageError: `vocab_size` is not the width of the logits.
        ModelError: a config.json that is not JSON.
    """
    if source.vocab_size is not None:
        if settings.vocab_size not in (None, source.vocab_size):
            raise UsageError(
                f"vocab_size: must be {source.vocab_size}, the width of the logits, found "
                f"{settings.vocab_size}; leave it out"
            )
        return source.vocab_size
    if settings.vocab_size is not None:
        return settings.vocab_size
    path = settings.tokenizer / "config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not JSON ({error}); copy it again") from error
        nested = config.get("text_config") or {}
        size = config.get("vocab_size") or nested.get("vocab_size")
        if isinstance(size, int):
            return size
    return int(max(tokenizer.get_vocab().values())) + 1


def describe(settings: ImportSettings, source: Source, found: Survey, plan: Plan, tokenizer: Any) -> Dataset:
    """`dataset.json`: what the cache holds and what it was made from."""
    from pmetal_distill.models import chat_template_fingerprint, tokenizer_fingerprint

    return Dataset(
        fingerprint={
            "teacher": UNVERIFIED + settings.teacher_name,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chat_template": chat_template_fingerprint(tokenizer),
            "data": found.text_hash(),
            "packing": json.dumps({"import": settings.format, "source_sha256": source_hash(source)}),
            "codec": plan.codec(settings),
        },
        target=plan.spec,
        num_sequences=len(found.lengths),
        num_tokens=found.num_tokens,
        sequences_per_shard=settings.sequences_per_shard,
        max_sequence_length=max(found.lengths),
        rows_per_group=ROWS_PER_GROUP,
        meta={
            "teacher": settings.teacher_name,
            "data": str(settings.source),
            "imported_from": settings.format,
            "lost": plan.lost,
        },
    )


def source_hash(source: Source) -> str:
    """SHA-256 hex over names and contents of the source's files."""
    from pmetal_distill.gguf import file_sha256

    digest = hashlib.sha256()
    for file in source.files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


@dataclass(slots=True, eq=False)
class Import:
    """The second pass.

    Args:
        settings, source, found, plan: of the import.
        writer: where shards go.
        console: where progress goes.
    """

    settings: ImportSettings
    source: Source
    found: Survey
    plan: Plan
    writer: "CacheWriter"
    console: Console
    tokens: int = 0
    seconds: float = 0.0
    corrections: Corrections = field(default_factory=Corrections)
    alignment: Alignment = field(default_factory=Alignment)

    def write_missing(self) -> None:
        """Writes every shard that nobody has committed."""
        missing = self.writer.missing_shards()
        if not missing:
            return
        started = time.perf_counter()
        coding = learn(self.settings, self.source, self.found, self.plan, self.console)
        ranges = [self.writer.dataset.shard_range(shard) for shard in missing]
        total = sum(sum(self.found.lengths[r.start : r.stop]) for r in ranges)
        stream = enumerate(self.source.sequences())
        with self.console.progress("importing", total=total, unit="tokens") as progress:
            for shard, numbers in zip(missing, ranges, strict=True):
                measured = dict(coding.measured)
                self.writer.write_shard(
                    shard,
                    self._shard(numbers, stream, coding, progress, measured),
                    basis=coding.sidecars.basis,
                    codebook=coding.sidecars.codebook,
                    measured=measured,
                )
        self.seconds = time.perf_counter() - started

    def summary(self) -> dict[str, Any]:
        """What this process has written."""
        return {
            "first_choice_is_next_token": self.alignment.share(1),
            "padded_rows": self.corrections.padded,
            "rows_without_tail_mass": self.corrections.no_tail,
            "rows_with_too_much_tail_mass": self.corrections.heavy_tail,
            "new_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }

    def _shard(
        self,
        numbers: range,
        stream: Iterator[tuple[int, SourceSequence]],
        coding: Coding,
        progress: Progress,
        measured: dict[str, float],
    ) -> Iterator["CapturedSequence"]:
        """The sequences of a shard; those before it are passed over."""
        before = self.corrections
        for number, sequence in stream:
            if number < numbers.start:
                continue
            yield self._captured(sequence, coding)
            self.tokens += len(sequence.token_ids)
            progress.advance(len(sequence.token_ids))
            if number == numbers.stop - 1:
                break
        now = self.corrections
        moved = now.no_tail + now.heavy_tail - before.no_tail - before.heavy_tail
        measured["clipped_tails"] = float(moved)

    def _captured(self, sequence: SourceSequence, coding: Coding) -> "CapturedSequence":
        from pmetal_distill.offline.writer import CapturedSequence

        mask = self._usable(sequence)
        rows = np.flatnonzero(mask)
        if isinstance(sequence.said, Heads):
            heads = Heads(sequence.said.ids[rows], sequence.said.logprobs[rows])
            captured, corrections = head_targets(heads, self.plan.spec)
            self.corrections += corrections
        else:
            captured = self._of_logits(sequence.said, rows, coding, sequence.where)
        targets = TargetArrays.empty(
            len(mask), k=captured.k, num_nodes=captured.num_nodes, rank=captured.rank
        )
        for whole, part in zip(targets.parts(), captured.parts(), strict=True):
            whole[rows] = part
        self.alignment.add(targets.head_ids[:, 0], sequence.token_ids, sequence.documents, mask)
        return CapturedSequence(sequence.token_ids, sequence.documents, mask, targets)

    def _usable(self, sequence: SourceSequence) -> Bool:
        if isinstance(sequence.said, Heads) and self.plan.spec.tail != "none":
            return sequence.loss_mask & (sequence.said.counts >= self.plan.spec.k)
        return sequence.loss_mask

    def _of_logits(self, said: Logits, rows: Any, coding: Coding, where: str) -> TargetArrays:
        import mlx.core as mx

        from pmetal_distill.offline.capture import capture

        spec = self.plan.spec
        rank = coding.map.rank if coding.map else 0
        parts = [TargetArrays.empty(0, k=spec.k, num_nodes=spec.num_nodes, rank=rank)]
        try:
            for start in range(0, len(rows), CHUNK):
                logits = mx.array(said.rows(rows[start : start + CHUNK]))
                parts.append(capture(logits, spec, sketch=coding.map, first_row=start))
        except NonFiniteError as error:
            raise NonFiniteError(f"{where}: {error}") from error
        return TargetArrays.concatenate(parts)


def _states(source: Source) -> list[tuple[Path, int, int]]:
    found = [(file, file.stat()) for file in source.files]
    return [(file, state.st_size, state.st_mtime_ns) for file, state in found]

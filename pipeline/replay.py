"""`verify --replay`: runs the teacher again on cached tokens. Costs its forward pass over whole sequences.

The teacher is fed the token ids that lie beside the targets, so what is compared belongs to the same tokens
or is found out.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.console import Console
from pipeline.exchange import UNVERIFIED
from pipeline.text import packed_text
from pmetal_distill.device import on_gpu
from schemas.arrays import TargetArrays
from schemas.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    import mlx.core as mx

    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.batch import Batch
    from pmetal_distill.offline.reader import LogitCache
    from pmetal_distill.offline.replay import Mismatch, SketchJudge

BATCH_SIZE = 4
BLOCK_ROWS = 4096
METRIC_ROWS = 256
HEAD_CHUNK = 64
# A GPU may multiply float32 with the 11 digits of TF32. Over the layers of a random model, two batches of an
# H100 came to differ by several times 2^-11 of a logit in one of 32 rows.
TF32_ROUNDING = 2.0**-9
LISTED = 20
_TEACHER_PARTS = {"teacher": "weights", "tokenizer": "tokenizer", "chat_template": "chat template"}


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """What to replay.

    Attributes:
        teacher: mlx-lm folder, hub id or .gguf.
        rows: trained positions to compare, or all if there are fewer.
        seed: of their choice.
        data: text to check against too; None leaves it.
        split: of `data`.
        trust_remote_code: as in `cache`.
    """

    teacher: str
    rows: int
    seed: int = 0
    data: str | None = None
    split: str = "train"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UsageError(f"--replay: must be at least 1 row, found {self.rows}")
        if self.seed < 0:
            raise UsageError(f"--seed: must be 0 or more, found {self.seed}")


@dataclass(slots=True, eq=False)
class _Rows:
    """Rows of one basis that wait for their logits."""

    states: "list[mx.array]" = field(default_factory=list)
    spare: "list[mx.array]" = field(default_factory=list)
    targets: list[TargetArrays] = field(default_factory=list)
    token_ids: list[NDArray[np.int32]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


def add_replay(report: dict[str, Any], folder: Path, settings: ReplaySettings, console: Console) -> None:
    """Adds a replay to a report of `checking.verify`: its findings, and how much was compared.

    A damaged cache is not replayed: "replay" is then None.

    Raises:
        ModelError, DataError: teacher or text that cannot be read.
        NonFiniteError: the teacher gives NaN or infinity.
    """
    from pmetal_distill.models import load_model
    from pmetal_distill.offline.reader import LogitCache

    report["replay"] = None
    if any(finding["kind"] == "damage" for finding in report["findings"]):
        return
    cache = LogitCache(folder, verify_hashes="never", allow_partial=True)
    # In the type the cache was made in: another one differs by more than the grid's step.
    dtype = cast(Any, cache.dataset.meta.get("teacher_dtype", "auto"))
    teacher = load_model(settings.teacher, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    findings = list(compare_fingerprints(cache, teacher, settings))
    replay = Replay(cache, teacher)
    if teacher.vocab_size == cache.dataset.target.vocab_size:
        findings += replay.run(settings.rows, settings.seed, console)
    report["replay"] = {
        "rows": replay.rows,
        "sequences": replay.sequences,
        "mismatched_rows": replay.mismatched_rows,
        "mismatches": dict(replay.mismatches),
    }
    report["findings"] += findings
    report["ok"] = report["ok"] and not findings


def compare_fingerprints(
    cache: "LogitCache", teacher: "LoadedModel", settings: ReplaySettings
) -> Iterator[dict[str, Any]]:
    """One finding for everything given that is not what the cache was made from."""
    from pmetal_distill.models import chat_template_fingerprint, model_fingerprint, tokenizer_fingerprint

    stored = cache.dataset.fingerprint
    found = {
        "teacher": model_fingerprint(teacher),
        "tokenizer": tokenizer_fingerprint(teacher.tokenizer),
        "chat_template": chat_template_fingerprint(teacher.tokenizer),
    }
    for part, name in _TEACHER_PARTS.items():
        if found[part] != stored[part] and not stored[part].startswith(UNVERIFIED):
            must = f"{name} of {settings.teacher} must have fingerprint {stored[part][:16]}"
            yield _finding("fingerprint", "dataset.json", f"{must}, found {found[part][:16]}")
    size = cache.dataset.target.vocab_size
    if teacher.vocab_size != size:
        message = f"{settings.teacher} must have a vocabulary of {size}, found {teacher.vocab_size}"
        yield _finding("fingerprint", "dataset.json", f"{message}; no row was compared")
    if settings.data is not None:
        packing = json.loads(stored["packing"])
        if "import" in packing:
            raise UsageError("--data: an imported cache holds text packed by others; leave --data out")
        data = packed_text(
            settings.data,
            teacher,
            split=settings.split,
            max_seq_len=packing["max_seq_len"],
            mask_prompt=packing["mask_prompt"],
            packing=packing["pack"],
        ).fingerprint()
        if data != stored["data"]:
            must = f"text of {settings.data} must have fingerprint {stored['data'][:16]}"
            yield _finding("fingerprint", "dataset.json", f"{must}, found {data[:16]}")


@dataclass(slots=True, eq=False)
class Replay:
    """The comparison of stored rows with a teacher.

    Args:
        cache: opened with all that is stored.
        teacher: with the cache's vocabulary size.
    """

    cache: "LogitCache"
    teacher: "LoadedModel"
    rows: int = 0
    sequences: int = 0
    mismatched_rows: int = 0
    mismatches: Counter[str] = field(default_factory=Counter)
    _judges: "dict[int, SketchJudge]" = field(default_factory=dict)

    def run(self, num_rows: int, seed: int, console: Console) -> list[dict[str, Any]]:
        """Findings of `num_rows` random trained rows, `LISTED` of them at most for each part."""
        chosen = choose_rows(self.cache, num_rows, seed)
        self.sequences = len(chosen)
        findings: list[dict[str, Any]] = []
        total = sum(map(len, chosen.values()))
        with console.progress("replaying", total=total, unit="rows") as progress:
            for block in _blocks(chosen, seed):
                findings += self._block({number: chosen[number] for number in block})
                progress.advance(sum(len(chosen[number]) for number in block))
        left = {part: count - LISTED for part, count in self.mismatches.items() if count > LISTED}
        for part, count in left.items():
            findings.append(_finding("replay", "shards", f"{part}: {count} more rows do not match"))
        return findings

    def _block(self, chosen: dict[int, NDArray[np.int64]]) -> Iterator[dict[str, Any]]:
        spare = -(-METRIC_ROWS // len(chosen))
        by_basis: dict[int, _Rows] = {}
        for batch in _batches(self.cache, list(chosen)):
            self._forward(batch, chosen, spare, by_basis)
        for index, waiting in sorted(by_basis.items()):
            self._know(index, waiting)
            yield from self._compare(index, waiting)

    def _forward(
        self, batch: "Batch", chosen: dict[int, NDArray[np.int64]], spare: int, into: dict[int, _Rows]
    ) -> None:
        import mlx.core as mx

        from pmetal_distill.host_inputs import to_device

        token_ids = to_device(batch.token_ids)
        if self.teacher.splits:
            final = self.teacher.hidden(token_ids, documents=batch.documents).final
        else:
            final = self.teacher.full(token_ids, documents=batch.documents)
        for at, number in enumerate(batch.numbers.tolist()):
            positions = chosen[number]
            waiting = into.setdefault(int(batch.basis_index[at]), _Rows())
            waiting.states.append(final[at][to_device(positions.astype(np.int32))])
            waiting.targets.append(batch.targets[at][positions])
            waiting.token_ids.append(batch.token_ids[at][positions])
            waiting.places += [(number, int(position)) for position in positions]
            trained = np.flatnonzero(batch.loss_mask[at])
            spread = trained[np.linspace(0, len(trained) - 1, min(spare, len(trained))).astype(np.int32)]
            waiting.spare.append(final[at][to_device(spread.astype(np.int32))])
            mx.eval(waiting.states[-1], waiting.spare[-1])

    def _know(self, index: int, waiting: _Rows) -> None:
        """Makes the judge of a basis, once, with the metric of the first rows that use it."""
        from pmetal_distill.offline.replay import SketchJudge
        from pmetal_distill.offline.sketch import meant_tokens

        if index < 0 or index in self._judges:
            return
        meant = sum(meant_tokens(logits) for logits, _ in self._logits(waiting.spare))
        self._judges[index] = SketchJudge(self.cache.bases[index], np.asarray(meant, np.float64))

    def _compare(self, index: int, waiting: _Rows) -> Iterator[dict[str, Any]]:
        from pmetal_distill.offline.replay import compare_head_and_curve, noise_of

        targets, token_ids = TargetArrays.concatenate(waiting.targets), np.concatenate(waiting.token_ids)
        start = 0
        for logits, rounding in self._logits(waiting.states):
            rows = slice(start, start + len(logits))
            places = waiting.places[rows]
            finite = np.isfinite(logits).all(axis=1)
            if not finite.all():
                number, position = places[int(finite.argmin())]
                raise NonFiniteError(
                    f"sequence {number} position {position}: the teacher's logits must be finite, found NaN "
                    "or infinity; see that its weights are whole"
                )
            noise = noise_of(logits, rounding)
            found = compare_head_and_curve(targets[rows], logits, self.cache.dataset.target, noise=noise)
            if index in self._judges:
                found += self._judges[index].compare(targets[rows], token_ids[rows], logits)
            yield from self._count(found, places)
            start += len(logits)

    def _count(self, found: "list[Mismatch]", places: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        self.rows += len(places)
        self.mismatched_rows += len({mismatch.row for mismatch in found})
        for mismatch in found:
            self.mismatches[mismatch.part] += 1
            if self.mismatches[mismatch.part] <= LISTED:
                number, position = places[mismatch.row]
                shard = number // self.cache.dataset.sequences_per_shard
                path = next(
                    f"shards/{record.targets.name}" for record in self.cache.records if record.shard == shard
                )
                place = f"{path} sequence {number} position {position}"
                yield _finding("replay", path, f"{place}: {mismatch.message}")

    def _logits(self, states: "list[mx.array]") -> Iterator[tuple[NDArray[np.float32], float]]:
        """Logits [m, V] of successive rows, and the unit roundoff of the teacher's type."""
        import mlx.core as mx

        from pmetal_distill.offline.capture import as_numpy

        rows = mx.concatenate(states)
        for start in range(0, len(rows), HEAD_CHUNK):
            part = rows[start : start + HEAD_CHUNK]
            logits = self.teacher.logits(part) if self.teacher.splits else part
            yield as_numpy(logits), max(float(mx.finfo(part.dtype).eps) / 2, TF32_ROUNDING if on_gpu() else 0)


def choose_rows(cache: "LogitCache", num_rows: int, seed: int) -> dict[int, NDArray[np.int64]]:
    """Random trained positions by sequence: `num_rows` of them, or all. Reads the sequences they lie in."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(cache.lengths)])
    total, trained = int(starts[-1]), cache.num_trained_tokens
    if not trained:
        return {}
    size = total
    if num_rows < trained:
        size = min(total, 2 * -(-num_rows * total // trained) + 64)
    while True:
        drawn = np.sort(rng.choice(total, size, replace=False))
        found = np.array(list(_trained(cache, drawn, starts)), np.int64).reshape(-1, 2)
        if len(found) >= num_rows or size == total:
            break
        size = min(total, 2 * size)
    if len(found) > num_rows:
        found = found[np.sort(rng.choice(len(found), num_rows, replace=False))]
    return {int(n): found[found[:, 0] == n, 1] for n in np.unique(found[:, 0])}


def _trained(
    cache: "LogitCache", drawn: NDArray[np.int64], starts: NDArray[np.int64]
) -> Iterator[tuple[int, int]]:
    """(sequence, position) of those drawn tokens, ascending, that are trained."""
    which = np.searchsorted(starts, drawn, side="right") - 1
    numbers, positions = cache.numbers[which], drawn - starts[which]
    for batch in _batches(cache, np.unique(numbers).tolist()):
        for number, mask in zip(batch.numbers.tolist(), batch.loss_mask, strict=True):
            inside = positions[np.searchsorted(numbers, number) : np.searchsorted(numbers, number, "right")]
            yield from ((number, int(position)) for position in inside[mask[inside]])


def _blocks(chosen: dict[int, NDArray[np.int64]], seed: int) -> Iterator[list[int]]:
    """Sequences in blocks of about `BLOCK_ROWS` rows, each block spread over all of them."""
    block, rows = [], 0
    for number in np.random.default_rng(seed).permutation(sorted(chosen)).tolist():
        block.append(number)
        rows += len(chosen[number])
        if rows >= BLOCK_ROWS:
            yield sorted(block)
            block, rows = [], 0
    if block:
        yield sorted(block)


def _batches(cache: "LogitCache", numbers: list[int]) -> "Iterator[Batch]":
    batches = cache.batches(
        batch_size=BATCH_SIZE, seed=0, epochs=1, shuffle=False, subset=numbers, prefetch=0, pad_multiple=1
    )
    with batches:
        yield from batches


def _finding(kind: str, path: str, message: str) -> dict[str, Any]:
    return {"kind": kind, "path": path, "message": message}


def replay_text(report: dict[str, Any]) -> str:
    """The replay of a report, in a line for people."""
    facts = report["replay"]
    if facts is None:
        return "not replayed: the cache is damaged"
    verdict = f"{facts['mismatched_rows']} do not match" if facts["mismatched_rows"] else "all match"
    return f"replayed {facts['rows']} rows of {facts['sequences']} sequences: {verdict}"

"""Check a whole cache: every hash, CRC and invariant. Reads every byte once or twice (about 1 M tokens/s)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from pmetal_distill.offline.commit import hash_stream, open_plain, read_plain
from pmetal_distill.offline.invariants import broken_rows, unclean_masked_row
from pmetal_distill.offline.mending import recorded_checksum
from pmetal_distill.offline.shard_reader import CheckedFiles, Shard, ShardReader, file_identity
from pmetal_distill.offline.store import DATASET, MAX_TOKENIZER_BYTES, SPARE, Store
from schemas.codec import Codec
from schemas.errors import CacheError, CorruptionError
from schemas.hidden import HiddenCodec
from schemas.manifest import MAX_DATASET_BYTES, CommitRecord

MAX_MISSING = 1000
Kind = Literal["damage", "missing", "orphan"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be.

    Attributes:
        kind: "damage" must be repaired, "missing" is a shard still to be written, "orphan" is a file that no
            record names (left by a killed writer; harmless).
        path: the file, relative to the cache.
        message: where, what must hold, what was found.
        shard: the shard that it makes unusable, if it is one.
    """

    kind: Kind
    path: str
    message: str
    shard: int | None = None

    def __str__(self) -> str:
        return self.message if self.message.startswith(self.path) else f"{self.path}: {self.message}"


@dataclass(slots=True)
class VerifyReport:
    """What was checked and found."""

    findings: list[Finding] = field(default_factory=list)
    shards: int = 0
    sequences: int = 0
    tokens: int = 0
    num_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Complete and undamaged."""
        return all(f.kind == "orphan" for f in self.findings)

    def damaged_shards(self) -> list[int]:
        """Shards that must be written again."""
        return sorted({f.shard for f in self.findings if f.kind == "damage" and f.shard is not None})


def verify_cache(path: Path | str, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check everything in a cache folder.

    Args:
        path: the folder.
        progress: called with (shards done, shards in total).

    Returns:
        the findings; nothing is raised for damage below `dataset.json`.

    Raises:
        UsageError: not a cache.
        CorruptionError, VersionError: `dataset.json` itself cannot be used.
    """
    store = Store.open(Path(path))
    report = VerifyReport()
    report.findings += _check_tokenizer(store)
    done = store.committed()
    if foreign := _foreign(store, done):
        report.findings.append(foreign)
        return report
    report.findings += _check_spare(store)
    named: set[str] = set()
    for count, shard in enumerate(done):
        report.findings += _check_shard(store, shard, report, named)
        if progress:
            progress(count + 1, len(done))
    report.findings += _missing(store.dataset.num_shards, done)
    report.findings += _check_orphans(store, named)
    if report.ok and report.tokens != store.dataset.num_tokens:
        message = (
            f"num_tokens must be the sum over the shards, {report.tokens}, found {store.dataset.num_tokens}"
        )
        report.findings.append(Finding("damage", DATASET, message))
    return report


def _foreign(store: Store, done: list[int]) -> Finding | None:
    """`dataset.json` and not the records is wrong when no record belongs to it and all to another."""
    for shard in done:
        try:
            store.record(shard)
        except CacheError:
            continue
        return None
    named = recorded_checksum(store.root / "commits")
    if named is None or named == store.checksum:
        return None
    message = f"must be the dataset {named[:16]} that the commit records name, found {store.checksum[:16]}"
    return Finding("damage", DATASET, f"{message}; restore it from a copy")


def _missing(num_shards: int, done: list[int]) -> Iterator[Finding]:
    """A finding for each missing shard, up to a number: a dataset may promise 16 million."""
    present = set(done)
    absent = (shard for shard in range(num_shards) if shard not in present)
    must = "must exist in a complete cache, found none"
    advice = "run 'pmetal-pipeline cache --resume'"
    for shard in islice(absent, MAX_MISSING):
        yield Finding("missing", f"commits/{shard:05d}.json", f"{must}; {advice}", shard)
    left = num_shards - len(done) - MAX_MISSING
    if left > 0:
        yield Finding("missing", "commits", f"{must} of {left:,} more shards; {advice}")


def _check_spare(store: Store) -> Iterator[Finding]:
    """The spare copy of `dataset.json`, which a cache need not have."""
    path = store.root / SPARE
    if not path.exists() and not path.is_symlink():
        return
    try:
        same = read_plain(path, max_bytes=MAX_DATASET_BYTES) == (store.root / DATASET).read_bytes()
        message = "must be a copy of dataset.json, found other bytes; run 'pmetal-pipeline repair'"
    except CorruptionError as error:
        same, message = False, str(error)
    if not same:
        yield Finding("damage", SPARE, message)


def _check_tokenizer(store: Store) -> Iterator[Finding]:
    for ref in store.dataset.tokenizer:
        try:
            store.checked("tokenizer", ref, max_bytes=MAX_TOKENIZER_BYTES)
        except CorruptionError as error:
            yield Finding("damage", f"tokenizer/{ref.name}", str(error))
    for name in store.strange_tokenizer_files():
        must = "must be named by dataset.json, as a tokenizer takes whatever its folder holds"
        yield Finding("damage", f"tokenizer/{name}", f"{must}; run 'pmetal-pipeline repair'")


def _check_shard(store: Store, shard: int, report: VerifyReport, named: set[str]) -> Iterator[Finding]:
    where = f"commits/{shard:05d}.json"
    try:
        record = store.record(shard)
    except CacheError as error:
        yield Finding("damage", where, str(error), shard)
        return
    named.update(record.files())
    report.shards += 1
    report.sequences += record.num_sequences
    report.tokens += record.num_tokens
    report.num_bytes += sum(
        ref.num_bytes for path, ref in record.files().items() if path.startswith("shards/")
    )
    broken = list(_check_sidecars(store, record)) or list(_check_hashes(store, record))
    yield from broken or _check_values(store, record)


def _check_sidecars(store: Store, record: CommitRecord) -> Iterator[Finding]:
    for ref, read in (
        (record.basis, store.basis),
        (record.codebook, store.codebook),
        (record.hidden_basis, store.hidden_basis),
    ):
        if ref is not None:
            try:
                read(ref)
            except CacheError as error:
                yield Finding("damage", f"bases/{ref.name}", str(error), record.shard)


def _check_hashes(store: Store, record: CommitRecord) -> Iterator[Finding]:
    for ref in (record.targets, record.hidden):
        if ref is None:
            continue
        path = f"shards/{ref.name}"
        try:
            with open_plain(store.root / path) as handle:
                size = file_identity(handle)[2]
                found = hash_stream(handle) if size == ref.num_bytes else f"{size} bytes"
        except CorruptionError as error:
            yield Finding("damage", path, str(error), record.shard)
            continue
        if found != ref.sha256:
            must = f"must have {ref.num_bytes} bytes with SHA-256 {ref.sha256[:16]}"
            message = f"{must}, found {found[:16]}; run 'pmetal-pipeline repair'"
            yield Finding("damage", path, message, record.shard)


def _check_values(store: Store, record: CommitRecord) -> Iterator[Finding]:
    path = f"shards/{record.targets.name}"
    try:
        shard = _open_shard(store, record)
        reader = ShardReader(store, checked=CheckedFiles(), verify=False)
        trained = 0
        for group in range(len(record.groups)):
            rows, targets = reader.targets(shard, group)
            trained += int(rows.loss_mask.sum())
            first = sum(map(sum, record.groups[:group]))
            problems = list(broken_rows(rows, targets, shard.codec.spec))
            unclean = unclean_masked_row(reader.table(shard, group), rows.loss_mask)
            if unclean is not None:
                problems.append((unclean, "rows outside the loss mask must be zero"))
            for row, must in problems:
                message = f"{path} row {first + row} (sequence {rows.sequences[row]}): {must}"
                yield Finding("damage", path, f"{message}; run 'pmetal-pipeline repair'", record.shard)
            if shard.hidden:
                reader.hidden(shard, group, shard.hidden.spec.layers)
        if trained != record.num_trained_tokens:
            message = (
                f"trained tokens must be {record.num_trained_tokens} as in the commit record, found {trained}"
            )
            yield Finding("damage", path, message, record.shard)
        reader.close()
    except CacheError as error:
        yield Finding("damage", path, str(error), record.shard)


def _open_shard(store: Store, record: CommitRecord) -> Shard:
    basis = store.basis(record.basis) if record.basis else None
    codebook = store.codebook(record.codebook) if record.codebook else None
    hidden = None
    if store.dataset.hidden:
        states = store.hidden_basis(record.hidden_basis) if record.hidden_basis else None
        hidden = HiddenCodec(store.dataset.hidden, states)
    first = store.dataset.shard_range(record.shard).start
    return Shard(record, first, Codec(store.dataset.target, basis, codebook), hidden)


def _check_orphans(store: Store, named: set[str]) -> Iterator[Finding]:
    for folder in ("shards", "bases"):
        for path in sorted((store.root / folder).glob("*")):
            relative = f"{folder}/{path.name}"
            if relative not in named and not path.name.startswith("."):
                yield Finding(
                    "orphan", relative, "is named by no commit record; may be left by a killed writer"
                )

"""`dataset.json` and the commit records: what a cache holds, and the proof that nobody changed it.

Both carry a checksum over their own bytes, so that any flipped bit is noticed; records name the dataset they
belong to by its checksum. Cost: one small file a shard.
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import CorruptionError, VersionError
from schemas.hidden_spec import HiddenSpec
from schemas.spec import TargetSpec
from schemas.strict import Fields, dump_object, parse_object

FORMAT = "pmetal-distill cache"
FORMAT_VERSION = 1
MAX_DATASET_BYTES = 1 << 20
MAX_RECORD_BYTES = 1 << 24
MAX_SEQUENCES = (1 << 31) - 1
MAX_TOKENS = 1 << 48
MAX_SEQUENCE_LENGTH = 1 << 20
MAX_GROUP_TOKENS = 1 << 22
MAX_SHARDS = 1 << 24
MAX_SEQUENCES_PER_SHARD = 1 << 19  # a record of so many lengths stays below MAX_RECORD_BYTES
MAX_FILE_BYTES = 1 << 40
FINGERPRINT_PARTS = ("teacher", "tokenizer", "chat_template", "data", "packing", "codec")
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the cache: a plain name inside its folder, its size and SHA-256."""

    name: str
    num_bytes: int
    sha256: str

    @staticmethod
    def of(name: str, data: bytes) -> "FileRef":
        """The reference of a file with this content."""
        return FileRef(name, len(data), hashlib.sha256(data).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"name": self.name, "bytes": self.num_bytes, "sha256": self.sha256}

    @staticmethod
    def read(fields: Fields, *, stem: str | None = None, suffix: str = "") -> "FileRef":
        """The reference in a JSON object; with `stem`, the name must be `<stem>-<sha16><suffix>`."""
        name = fields.text("name", pattern=PLAIN_NAME)
        ref = FileRef(
            name, fields.integer("bytes", 0, MAX_FILE_BYTES), fields.text("sha256", pattern="[0-9a-f]{64}")
        )
        fields.finish()
        if stem is not None and name != hashed_name(stem, ref.sha256, suffix):
            fields.fail(f"named {hashed_name(stem, ref.sha256, suffix)}", name)
        return ref


def hashed_name(stem: str, sha256: str, suffix: str) -> str:
    """`<stem>-<first 16 hex digits of the SHA-256><suffix>`."""
    return f"{stem}-{sha256[:16]}{suffix}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """The immutable description of a cache.

    Attributes:
        fingerprint: what the cache was made from; one short text for each of FINGERPRINT_PARTS.
        target: layout of the targets.
        num_sequences: sequences of the whole data set.
        num_tokens: tokens in them.
        sequences_per_shard: S; shard i holds sequences [i S, (i+1) S).
        max_sequence_length: tokens in the longest sequence, at most.
        rows_per_group: row groups end with the sequence that reaches this many tokens.
        hidden: layout of the hidden states, or None.
        tokenizer: the teacher's tokenizer files.
        meta: short texts for people.
    """

    fingerprint: dict[str, str]
    target: TargetSpec
    num_sequences: int
    num_tokens: int
    sequences_per_shard: int
    max_sequence_length: int
    rows_per_group: int = 4096
    hidden: HiddenSpec | None = None
    tokenizer: tuple[FileRef, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def num_shards(self) -> int:
        """Shards of the complete cache."""
        return -(-self.num_sequences // self.sequences_per_shard)

    def shard_range(self, shard: int) -> range:
        """Sequence numbers of a shard."""
        start = shard * self.sequences_per_shard
        return range(start, min(start + self.sequences_per_shard, self.num_sequences))

    def to_bytes(self) -> bytes:
        """The content of `dataset.json`."""
        return seal(
            {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "target": self.target.to_json(),
                "num_sequences": self.num_sequences,
                "num_tokens": self.num_tokens,
                "sequences_per_shard": self.sequences_per_shard,
                "max_sequence_length": self.max_sequence_length,
                "rows_per_group": self.rows_per_group,
                "hidden": self.hidden.to_json() if self.hidden else None,
                "tokenizer": [ref.to_json() for ref in self.tokenizer],
                "meta": self.meta,
            }
        )

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> "Dataset":
        """The dataset in the content of `dataset.json`.

        Raises:
            CorruptionError: damaged, or a value out of bounds.
            VersionError: written by a newer version.
        """
        fields = unseal(data, where=where, max_bytes=MAX_DATASET_BYTES)
        fields.choice("format", (FORMAT,))
        fingerprint = fields.sub("fingerprint")
        dataset = Dataset(
            fingerprint={part: fingerprint.text(part, max_length=500) for part in FINGERPRINT_PARTS},
            target=TargetSpec.from_json(fields.value("target"), where=f"{where}: 'target'"),
            num_sequences=fields.integer("num_sequences", 1, MAX_SEQUENCES),
            num_tokens=fields.integer("num_tokens", 1, MAX_TOKENS),
            sequences_per_shard=fields.integer("sequences_per_shard", 1, MAX_SEQUENCES_PER_SHARD),
            max_sequence_length=fields.integer("max_sequence_length", 1, MAX_SEQUENCE_LENGTH),
            rows_per_group=fields.integer("rows_per_group", 1, MAX_GROUP_TOKENS - MAX_SEQUENCE_LENGTH),
            hidden=_optional_hidden(fields.value("hidden"), where=f"{where}: 'hidden'"),
            tokenizer=tuple(
                FileRef.read(Fields(raw, where=f"{where}: 'tokenizer'"))
                for raw in fields.items("tokenizer", max_length=64)
            ),
            meta=fields.sub("meta").strings(),
        )
        fingerprint.finish()
        fields.finish()
        if dataset.num_shards > MAX_SHARDS:
            fields.fail(f"at most {MAX_SHARDS} shards", dataset.num_shards)
        return dataset


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """The content of one shard: the only thing that makes its files part of the cache.

    Attributes:
        shard: its number.
        dataset_checksum: checksum of the `dataset.json` it belongs to.
        targets: its target file.
        groups: lengths of the sequences of each row group, in order, from the shard's first sequence on.
        num_trained_tokens: rows inside the loss mask.
        basis, codebook, hidden, hidden_basis: files that go with it, or None.
        measured: named figures of the writer: clipped values, errors on held-back rows.
    """

    shard: int
    dataset_checksum: str
    targets: FileRef
    groups: tuple[tuple[int, ...], ...]
    num_trained_tokens: int
    basis: FileRef | None = None
    codebook: FileRef | None = None
    hidden: FileRef | None = None
    hidden_basis: FileRef | None = None
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """Sequences in the shard."""
        return sum(map(len, self.groups))

    @property
    def num_tokens(self) -> int:
        """Tokens in the shard."""
        return sum(map(sum, self.groups))

    def files(self) -> dict[str, FileRef]:
        """The files it names, by folder-relative path."""
        places = {
            "shards": (self.targets, self.hidden),
            "bases": (self.basis, self.codebook, self.hidden_basis),
        }
        return {f"{folder}/{ref.name}": ref for folder, refs in places.items() for ref in refs if ref}

    def to_bytes(self) -> bytes:
        """The content of the record's file."""
        files = {name: getattr(self, name) for name in ("basis", "codebook", "hidden", "hidden_basis")}
        return seal(
            {
                "format_version": FORMAT_VERSION,
                "shard": self.shard,
                "dataset": self.dataset_checksum,
                "targets": self.targets.to_json(),
                "groups": [list(g) for g in self.groups],
                "num_sequences": self.num_sequences,
                "num_tokens": self.num_tokens,
                "num_trained_tokens": self.num_trained_tokens,
                "measured": self.measured,
            }
            | {name: ref.to_json() if ref else None for name, ref in files.items()}
        )

    @staticmethod
    def from_bytes(data: bytes, dataset: Dataset, *, where: str) -> "CommitRecord":
        """The record in the content of its file, checked against the dataset's bounds.

        Raises:
            CorruptionError: damaged, out of bounds, or files that are not named as they must be.
            VersionError: written by a newer version.
        """
        fields = unseal(data, where=where, max_bytes=MAX_RECORD_BYTES)
        shard = fields.integer("shard", 0, dataset.num_shards - 1)
        groups = fields.items("groups", max_length=dataset.sequences_per_shard)
        measured = fields.sub("measured")
        record = CommitRecord(
            shard=shard,
            dataset_checksum=fields.text("dataset", pattern="[0-9a-f]{64}"),
            targets=FileRef.read(fields.sub("targets"), stem=f"targets-{shard:05d}", suffix=".parquet"),
            groups=tuple(_lengths(g, dataset, where=where) for g in groups),
            num_trained_tokens=fields.integer("num_trained_tokens", 0, MAX_TOKENS),
            basis=_optional_file(fields, "basis", "basis", ".safetensors"),
            codebook=_optional_file(fields, "codebook", "codebook", ".safetensors"),
            hidden=_optional_file(fields, "hidden", f"hidden-{shard:05d}", ".parquet"),
            hidden_basis=_optional_file(fields, "hidden_basis", "hidden_basis", ".safetensors"),
            measured={key: measured.number(key, -1e300, 1e300) for key in measured.names()},
        )
        fields.integer("num_sequences", record.num_sequences, record.num_sequences)
        fields.integer("num_tokens", record.num_tokens, record.num_tokens)
        fields.finish()
        record.check(dataset, where=where, fields=fields)
        return record

    def check(self, dataset: Dataset, *, where: str, fields: Fields | None = None) -> None:
        """Whether the record describes the shard that `dataset` wants.

        Raises:
            CorruptionError: wrong sequences, tokens, or files for the tail and hidden modes.
        """
        fields = fields or Fields({}, where=where)
        wanted = len(dataset.shard_range(self.shard))
        if self.num_sequences != wanted:
            fields.fail(f"{wanted} sequences", self.num_sequences)
        if self.num_trained_tokens > self.num_tokens:
            fields.fail(f"at most {self.num_tokens} trained tokens", self.num_trained_tokens)
        if (self.basis is not None) != (dataset.target.tail == "sketch"):
            fields.fail(f"a basis exactly with tail 'sketch' (tail is '{dataset.target.tail}')", self.basis)
        if (self.hidden is not None) != (dataset.hidden is not None):
            fields.fail("a hidden file exactly when the dataset has hidden states", self.hidden)
        if (self.hidden_basis is not None) != (dataset.hidden is not None and dataset.hidden.rank > 0):
            fields.fail("a hidden basis exactly when hidden states have a rank", self.hidden_basis)


def seal(value: dict[str, Any]) -> bytes:
    """`value` as JSON with a key `checksum`: SHA-256 of the file with 64 zeros in the checksum's place."""
    blank = dump_object({**value, "checksum": "0" * 64})
    return blank.replace(b'"checksum": "' + b"0" * 64, b'"checksum": "' + checksum_of(blank).encode(), 1)


def checksum_of(data: bytes) -> str:
    """SHA-256 hex of sealed JSON with its checksum's digits replaced by zeros; "" without exactly one."""
    blank, found = _CHECKSUM.subn(b'"checksum": "' + b"0" * 64 + b'"', data)
    return hashlib.sha256(blank).hexdigest() if found == 1 else ""


def unseal(data: bytes, *, where: str, max_bytes: int) -> Fields:
    """The fields of sealed JSON, without format version and checksum.

    Raises:
        CorruptionError: the checksum is not that of the content.
        VersionError: a newer format version.
    """
    raw = parse_object(data, where=where, max_bytes=max_bytes)
    version = raw.pop("format_version", None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        must = f"format_version must be at most {FORMAT_VERSION}"
        raise VersionError(f"{where}: {must}, found {version}; upgrade pmetal-distill")
    checksum = raw.pop("checksum", None)
    if version != FORMAT_VERSION or isinstance(version, bool) or checksum != checksum_of(data):
        raise CorruptionError(
            f"{where}: content must match its checksum, found other bytes; restore the file"
        )
    return Fields(raw, where=where)


def _optional_file(fields: Fields, key: str, stem: str, suffix: str) -> FileRef | None:
    return None if fields.value(key) is None else FileRef.read(fields.sub(key), stem=stem, suffix=suffix)


def _optional_hidden(raw: object, *, where: str) -> HiddenSpec | None:
    return None if raw is None else HiddenSpec.from_json(raw, where=where)


def _lengths(raw: object, dataset: Dataset, *, where: str) -> tuple[int, ...]:
    group = Fields({"groups": raw}, where=where)
    lengths = group.integers("groups", 1, dataset.max_sequence_length, max_length=dataset.sequences_per_shard)
    if not lengths or sum(lengths) > MAX_GROUP_TOKENS:
        group.fail(f"row groups of 1 to {MAX_GROUP_TOKENS} tokens", sum(lengths))
    if sum(lengths[:-1]) >= dataset.rows_per_group:
        group.fail(f"row groups that end at {dataset.rows_per_group} tokens", sum(lengths))
    return lengths

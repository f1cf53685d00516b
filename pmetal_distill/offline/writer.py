"""Writing a cache: shards in any order, on any number of processes, through any interruption.

A shard becomes part of the cache when its commit record appears, which happens at most once. Cost beyond
encoding: a second read of each shard (decompressed and compared), SHA-256 of it, and four fsyncs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pmetal_distill.offline.commit import (
    Scratch,
    failing_writes,
    flush_folder,
    move,
    put_if_absent,
    write_scratch,
)
from pmetal_distill.offline.mending import alone, mend_dataset, spare_dataset
from pmetal_distill.offline.shard import RowGroups, ShardDraft, ShardFiles
from pmetal_distill.offline.store import DATASET, FOLDERS, SHARD_FILE, SPARE, Store
from schemas.arrays import Bool, Float32, Int32, TargetArrays
from schemas.basis import SketchBasis
from schemas.codebook import Codebook
from schemas.codec import Codec, Saturation
from schemas.errors import (
    CacheError,
    CorruptionError,
    FingerprintError,
    IncompatibleError,
    UsageError,
    VersionError,
)
from schemas.hidden import HiddenBasis, HiddenCodec
from schemas.manifest import FINGERPRINT_PARTS, CommitRecord, Dataset, FileRef, hashed_name

_OPTIONS = {
    "teacher": "--teacher",
    "data": "--data",
    "packing": "--max-seq-len, --pack, --mask-prompt",
    "max_sequence_length": "--max-seq-len",
    "sequences_per_shard": "--sequences-per-shard",
    "codec": "--sketch-rank, --sketch-step, --calibration-tokens",
    "target.k": "--top-k",
    "target.tail": "--tail",
    "hidden": "--hidden-layers",
}


@dataclass(frozen=True, slots=True, eq=False)
class CapturedSequence:
    """One sequence with what the teacher said about it.

    Attributes:
        token_ids, documents: int32 [n]; documents are numbered inside the sequence.
        loss_mask: bool [n].
        targets: exact values as captured, [n, ...], or [t, ...] of the t trained positions alone.
        hidden: float32 [n, d] by layer.
        predicted: whether the coordinates lack what the basis' predictor says already.
    """

    token_ids: Int32
    documents: Int32
    loss_mask: Bool
    targets: TargetArrays
    hidden: Mapping[int, Float32] = field(default_factory=dict)
    predicted: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sidecars:
    """The sidecars that a shard is coded with: what its data set asks for."""

    basis: SketchBasis | None = None
    codebook: Codebook | None = None
    hidden_basis: HiddenBasis | None = None


class CacheWriter:
    """One process writing shards of a cache. Use as a context manager, or call `close`."""

    def __init__(self, store: Store, *, zstd_level: int = 1) -> None:
        self.store = store
        self._level = zstd_level
        self._scratch = Scratch(store.root)
        self._refs: dict[int, tuple[object, FileRef]] = {}

    @property
    def dataset(self) -> Dataset:
        """The dataset as it lies on disk."""
        return self.store.dataset

    @staticmethod
    def create_or_resume(
        folder: Path, dataset: Dataset, tokenizer_files: Mapping[str, bytes], *, zstd_level: int = 1
    ) -> "CacheWriter":
        """Open a folder for writing this dataset; creates it when there is none, mends its `dataset.json`.

        Args:
            folder: empty, missing, or a cache of the same dataset.
            dataset: what is going to be written; its `tokenizer` field is filled in here.
            tokenizer_files: the teacher's tokenizer by plain file name.
            zstd_level: of the shards that this process writes, 1 to 22; readers need not know it.

        Raises:
            UsageError: the folder holds something else.
            IncompatibleError: a value of `dataset` out of its bounds.
            FingerprintError: the folder holds a cache of other inputs; says which part differs.
            CacheError: the folder cannot be written.
        """
        tokenizer = tuple(FileRef.of(name, data) for name, data in sorted(tokenizer_files.items()))
        wanted = replace(dataset, tokenizer=tokenizer)
        data = wanted.to_bytes()
        _check_new(data)
        with failing_writes(f"{folder.name}"):
            _prepare(folder)
            _mend(folder, data)
            with Scratch(folder) as scratch:
                put_if_absent(write_scratch(scratch, DATASET, data), folder / DATASET)
                store = Store.open(folder)
                _check_same(store.dataset, wanted)
                _keep_spare(store, scratch)
                _write_tokenizer(store, tokenizer_files, scratch)
            return CacheWriter(store, zstd_level=zstd_level)

    def missing_shards(self) -> list[int]:
        """Shards without a commit record, ascending: what is left to do.

        Removes, on the way, files of committed shards that lost a race or belong to a killed writer.

        Raises:
            CorruptionError: a record that is there is damaged.
        """
        lying = [path for path in (self.store.root / "shards").iterdir() if SHARD_FILE.fullmatch(path.name)]
        done = self.store.committed()
        named = {path for shard in done for path in self.store.record(shard).files()}
        finished = set(done)
        for path in lying:
            match = SHARD_FILE.fullmatch(path.name)
            if match and int(match.group(1)) in finished and f"shards/{path.name}" not in named:
                path.unlink(missing_ok=True)
        return sorted(set(range(self.dataset.num_shards)).difference(done))

    def write_basis(self, basis: SketchBasis | Codebook | HiddenBasis) -> FileRef:
        """Put a sidecar into `bases/`, once, and return its reference."""
        known = self._refs.get(id(basis))
        if known is not None:
            return known[1]
        kind = {SketchBasis: "basis", Codebook: "codebook", HiddenBasis: "hidden_basis"}[type(basis)]
        data = basis.to_bytes()
        ref = FileRef.of("", data)
        ref = replace(ref, name=hashed_name(kind, ref.sha256, ".safetensors"))
        with failing_writes(f"bases/{ref.name}"):
            move(write_scratch(self._scratch, ref.name, data), self.store.root / "bases" / ref.name)
        self._refs[id(basis)] = (basis, ref)
        return ref

    def write_shard(
        self,
        index: int,
        sequences: Iterable[CapturedSequence],
        *,
        basis: SketchBasis | None = None,
        codebook: Codebook | None = None,
        hidden_basis: HiddenBasis | None = None,
        measured: Mapping[str, float] | None = None,
    ) -> CommitRecord:
        """Write and commit one shard; does nothing (and does not touch `sequences`) when it is committed.

        Args:
            index: shard number; `sequences` are those of `dataset.shard_range(index)`, in order.
            sequences: consumed once, a row group at a time.
            basis, codebook, hidden_basis: sidecars of this shard.
            measured: figures for the record, read after `sequences` is consumed.

        Returns:
            the record that stands: this one, or that of another writer who was first.

        Raises:
            IncompatibleError: sequences that do not fit the dataset.
            NonFiniteError: NaN or infinity in a trained row.
            CorruptionError: the file did not read back as written.
            CacheError: it could not be written.
        """
        if self.is_committed(index):
            return self.store.record(index)
        sidecars = Sidecars(basis, codebook, hidden_basis)
        draft = self.draft(index, sidecars)
        groups = RowGroups(index, self.dataset)
        try:
            with failing_writes(f"shard {index}"):
                for sequence in sequences:
                    if group := groups.add(sequence):
                        draft.write(draft.encode(group))
                if group := groups.rest():
                    draft.write(draft.encode(group))
            return self.commit(index, draft, sidecars, measured or {})
        finally:
            draft.abandon()

    def is_committed(self, index: int) -> bool:
        """Whether somebody has committed a shard."""
        return self.store.record_path(index).exists()

    def draft(self, index: int, sidecars: Sidecars) -> ShardDraft:
        """The empty files of a shard in this writer's scratch folder, for `commit`.

        Raises:
            IncompatibleError: sidecars that do not fit the dataset.
            CacheError: a file could not be made.
        """
        codec = Codec(self.dataset.target, sidecars.basis, sidecars.codebook)
        hidden = HiddenCodec(self.dataset.hidden, sidecars.hidden_basis) if self.dataset.hidden else None
        with failing_writes(f"shard {index}"):
            return ShardDraft(self._scratch, codec, hidden, level=self._level)

    def commit(
        self, index: int, draft: ShardDraft, sidecars: Sidecars, measured: Mapping[str, float]
    ) -> CommitRecord:
        """Finish a draft that holds all row groups of a shard and make it part of the cache.

        Returns, Raises:
            as `write_shard`.
        """
        with failing_writes(f"shard {index}"):
            files = draft.finish()
            basis, codebook, hidden_basis = (
                self.write_basis(part) if part else None
                for part in (sidecars.basis, sidecars.codebook, sidecars.hidden_basis)
            )
            record = CommitRecord(
                shard=index,
                dataset_checksum=self.store.checksum,
                targets=self._place(f"targets-{index:05d}", files.targets),
                groups=files.groups,
                num_trained_tokens=files.saturation.tokens,
                basis=basis,
                codebook=codebook,
                hidden=self._place(f"hidden-{index:05d}", files.hidden) if files.hidden else None,
                hidden_basis=hidden_basis,
                measured=_measured(files, measured),
            )
            return self._publish(record)

    def close(self) -> None:
        """Remove this writer's scratch folder."""
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, stem: str, file: tuple[Path, int, str]) -> FileRef:
        path, num_bytes, sha256 = file
        ref = FileRef(hashed_name(stem, sha256, ".parquet"), num_bytes, sha256)
        move(path, self.store.root / "shards" / ref.name)
        return ref

    def _publish(self, record: CommitRecord) -> CommitRecord:
        """Put the record; the loser of a race takes the winner's and discards its own files."""
        target = self.store.record_path(record.shard)
        won = put_if_absent(write_scratch(self._scratch, target.name, record.to_bytes()), target)
        if won and not all((self.store.root / path).exists() for path in record.files()):
            target.unlink(missing_ok=True)
            raise CacheError(
                f"shard {record.shard}: its files vanished under the writer; run it again with --resume"
            )
        standing = self.store.record(record.shard)
        for path in set(record.files()) - set(standing.files()):
            if path.startswith("shards/"):
                (self.store.root / path).unlink(missing_ok=True)
        return standing


def _prepare(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: must be a folder, found a file; choose another output")
    known = {DATASET, "_tmp", "quarantine", *FOLDERS}
    if folder.is_dir() and (
        strange := sorted(p.name for p in folder.iterdir() if _is_strange(p.name, known))
    ):
        raise UsageError(f"{folder}: must be empty or a cache, found {strange[:5]}; choose another output")
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    flush_folder(folder)


def _mend(folder: Path, wanted: bytes) -> None:
    """Puts a damaged or missing `dataset.json` of a cache right; `wanted` is what it probably was."""
    if (folder / DATASET).exists() or (folder / DATASET).is_symlink():
        try:
            Store.open(folder)
        except (CorruptionError, VersionError):
            pass
        else:
            return
    elif spare_dataset(folder) is None:
        return
    with alone(folder):
        mend_dataset(folder, guesses=[wanted])


def _keep_spare(store: Store, scratch: Scratch) -> None:
    """A second copy of `dataset.json`, which all records depend on."""
    if not (store.root / SPARE).exists():
        data = (store.root / DATASET).read_bytes()
        put_if_absent(write_scratch(scratch, DATASET, data), store.root / SPARE)


def _is_strange(name: str, known: set[str]) -> bool:
    return name not in known and not name.startswith(".")


def _check_new(data: bytes) -> None:
    try:
        Dataset.from_bytes(data, where="new dataset")
    except CorruptionError as error:
        raise IncompatibleError(str(error)) from error


def _check_same(found: Dataset, wanted: Dataset) -> None:
    differing = [part for part in FINGERPRINT_PARTS if found.fingerprint[part] != wanted.fingerprint[part]]
    names = ("num_sequences", "num_tokens", "sequences_per_shard", "max_sequence_length", "rows_per_group")
    differing += [name for name in names if getattr(found, name) != getattr(wanted, name)]
    old, new = found.target.to_json(), wanted.target.to_json()
    differing += [f"target.{key}" for key in old if old[key] != new[key]]
    if found.hidden != wanted.hidden:
        differing.append("hidden")
    if not differing and found.tokenizer != wanted.tokenizer:
        differing.append("tokenizer files")
    if differing:
        values = "; ".join(
            f"{_named(d)}: {_value(found, d)} in the cache, {_value(wanted, d)} now" for d in differing[:4]
        )
        advice = "give the same inputs, or another output folder"
        raise FingerprintError(f"{values}; {DATASET}: the cache must be of the same inputs; {advice}")


def _named(part: str) -> str:
    """A part with the options that decide it, which is what a user can change."""
    return f"{_OPTIONS[part]} ({part})" if part in _OPTIONS else part


def _value(dataset: Dataset, name: str) -> str:
    if name in ("teacher", "data") and name in dataset.meta:
        return f"{dataset.meta[name]} ({dataset.fingerprint[name].removeprefix('sha256:')[:12]})"
    if name in dataset.fingerprint:
        value = dataset.fingerprint[name]
        return repr(value[:40] if value.startswith("sha256:") else value)
    if name.startswith("target."):
        return repr(dataset.target.to_json()[name.removeprefix("target.")])
    return "other" if name == "tokenizer files" else repr(getattr(dataset, name))


def _write_tokenizer(store: Store, files: Mapping[str, bytes], scratch: Scratch) -> None:
    for ref in store.dataset.tokenizer:
        try:
            store.checked("tokenizer", ref)
        except CorruptionError:
            move(write_scratch(scratch, ref.name, files[ref.name]), store.root / "tokenizer" / ref.name)


def _measured(files: ShardFiles, extra: Mapping[str, float]) -> dict[str, float]:
    clipped: Saturation = files.saturation
    figures = {
        "clipped_logprobs": clipped.logprobs,
        "clipped_curve": clipped.curve,
        "clipped_coordinates": clipped.coordinates,
    }
    return {name: float(np.float64(value)) for name, value in (figures | dict(extra)).items()}

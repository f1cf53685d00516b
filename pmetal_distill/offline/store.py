"""The small files of a cache folder: dataset, commit records, sidecars. Trusts records, not listings."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from pmetal_distill.offline.commit import DATASET, check_folder, read_plain
from pmetal_distill.offline.mirror import Mirror
from pmetal_distill.offline.remote import is_url
from schemas.basis import MAX_RANK, SketchBasis
from schemas.codebook import Codebook
from schemas.errors import CorruptionError, UsageError
from schemas.hidden import HiddenBasis
from schemas.manifest import (
    MAX_DATASET_BYTES,
    MAX_RECORD_BYTES,
    CommitRecord,
    Dataset,
    FileRef,
    checksum_of,
)
from schemas.tensors import MAX_HEADER_BYTES

__all__ = ["DATASET", "FOLDERS", "SHARD_FILE", "SPARE", "Store"]

MAX_SIDECAR_BYTES = 1 << 32
MAX_TOKENIZER_BYTES = 1 << 28
SPARE = ".dataset.json"
FOLDERS = ("shards", "commits", "bases", "tokenizer")
SHARD_FILE = re.compile(r"(?:targets|hidden)-(\d{5,8})-[0-9a-f]{16}\.parquet")
_RECORD_NAME = re.compile(r"(\d{5,8})\.json")


@dataclass(frozen=True, slots=True)
class Store:
    """A cache folder with a dataset in it.

    Attributes:
        root: the folder.
        dataset: its description.
        checksum: the checksum of `dataset.json`.
        mirror: fills the folder from object storage; None where it is the cache itself.
    """

    root: Path
    dataset: Dataset
    checksum: str
    mirror: Mirror | None = None

    @staticmethod
    def open(place: Path | str) -> "Store":
        """Read `dataset.json` of a folder or a URL.

        Raises:
            UsageError: no such folder, or not a cache.
            CorruptionError, VersionError: damaged or of a newer version.
            CacheError: the storage behind a URL does not answer.
        """
        mirror = Mirror(str(place)) if is_url(place) else None
        root = mirror.root if mirror else Path(place)
        path = root / DATASET
        if not path.exists() and not path.is_symlink():
            raise UsageError(f"{root}: must be a cache folder, found no {DATASET}; check the path")
        data = read_plain(path, max_bytes=MAX_DATASET_BYTES)
        dataset = Dataset.from_bytes(data, where=DATASET)
        for name in FOLDERS:
            # Tools that copy a cache may drop empty folders; what is there must be a real folder.
            if name == "commits" or (root / name).is_symlink() or (root / name).exists():
                check_folder(root / name)
        return Store(root, dataset, checksum_of(data), mirror)

    def record_path(self, shard: int) -> Path:
        """Where the commit record of a shard lies."""
        return self.root / "commits" / f"{shard:05d}.json"

    def committed(self) -> list[int]:
        """Shards that have a commit record, ascending."""
        try:
            names = {path.name for path in (self.root / "commits").iterdir()}
        except OSError as error:
            must = "commits: must be a readable folder"
            raise CorruptionError(f"{must}, found {error.strerror}; check its permissions") from error
        numbers = sorted({int(m.group(1)) for name in names if (m := _RECORD_NAME.fullmatch(name))})
        return [n for n in numbers if n < self.dataset.num_shards and f"{n:05d}.json" in names]

    def record(self, shard: int) -> CommitRecord:
        """The commit record of a shard.

        Raises:
            CorruptionError: missing, damaged, of another shard or of another cache.
        """
        where = f"commits/{shard:05d}.json"
        data = read_plain(self.record_path(shard), max_bytes=MAX_RECORD_BYTES)
        record = CommitRecord.from_bytes(data, self.dataset, where=where)
        if record.shard != shard or record.dataset_checksum != self.checksum:
            found = f"shard {record.shard} of dataset {record.dataset_checksum[:16]}"
            must = f"must be shard {shard} of this dataset ({self.checksum[:16]})"
            raise CorruptionError(f"{where}: {must}, found {found}; run 'pmetal-pipeline repair'")
        return record

    def manifest_root(self, records: list[CommitRecord]) -> str:
        """SHA-256 over the dataset and the given records: names exactly this content."""
        digest = hashlib.sha256(self.checksum.encode())
        for record in records:
            digest.update(hashlib.sha256(record.to_bytes()).digest())
        return digest.hexdigest()

    def sidecar(self, ref: FileRef) -> bytes:
        """The bytes of a sidecar, checked against size and hash.

        Raises:
            CorruptionError: missing or other bytes than the record names.
        """
        return self.checked("bases", ref)

    def basis(self, ref: FileRef) -> SketchBasis:
        """A sketch basis of this cache.

        Raises:
            CorruptionError: missing, damaged, or of another vocabulary.
        """
        size = self.dataset.target.vocab_size
        most = (4 + 2 * MAX_RANK) * size + 8 * MAX_RANK**2 + 2 * MAX_HEADER_BYTES
        data = self.checked("bases", ref, max_bytes=most)
        basis = SketchBasis.from_bytes(data, where=f"bases/{ref.name}")
        if basis.vocab_size != self.dataset.target.vocab_size:
            must = f"must have V={self.dataset.target.vocab_size}"
            raise CorruptionError(f"bases/{ref.name}: {must}, found V={basis.vocab_size}")
        return basis

    def codebook(self, ref: FileRef) -> Codebook:
        """A codebook of this cache.

        Raises:
            CorruptionError: missing, damaged, or of another layout.
        """
        most = 4 * self.dataset.target.vocab_size + 2 * MAX_HEADER_BYTES
        data = self.checked("bases", ref, max_bytes=most)
        codebook = Codebook.from_bytes(data, where=f"bases/{ref.name}")
        if not codebook.fits(self.dataset.target):
            raise CorruptionError(f"bases/{ref.name}: must have the vocabulary and nodes of the dataset")
        return codebook

    def hidden_basis(self, ref: FileRef) -> HiddenBasis:
        """A hidden-state basis of this cache.

        Raises:
            CorruptionError: missing, damaged, or of another layout.
        """
        spec = self.dataset.hidden
        values = len(spec.layers) * spec.hidden_size * (4 + 2 * spec.rank) if spec else 0
        data = self.checked("bases", ref, max_bytes=values + 2 * MAX_HEADER_BYTES)
        basis = HiddenBasis.from_bytes(data, where=f"bases/{ref.name}")
        if spec is None or not basis.fits(spec):
            raise CorruptionError(f"bases/{ref.name}: must have the layers, width and rank of the dataset")
        return basis

    def tokenizer(self) -> Path:
        """The folder of the tokenizer's files, which holds what `dataset.json` names and nothing else.

        Raises:
            CorruptionError: one of them is missing or changed, or there is another.
        """
        folder = self.root / "tokenizer"
        for ref in self.dataset.tokenizer:
            self.checked("tokenizer", ref, max_bytes=MAX_TOKENIZER_BYTES)
        for name in self.strange_tokenizer_files():
            must = "must be named by dataset.json, as a tokenizer takes whatever its folder holds"
            raise CorruptionError(f"tokenizer/{name}: {must}, found it unnamed; run 'pmetal-pipeline repair'")
        return folder

    def strange_tokenizer_files(self) -> list[str]:
        """Names in `tokenizer/` that `dataset.json` does not know, without hidden ones."""
        folder = self.root / "tokenizer"
        known = {ref.name for ref in self.dataset.tokenizer}
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [name for name in there if name not in known and not name.startswith(".")]

    def checked(self, folder: str, ref: FileRef, *, max_bytes: int = MAX_SIDECAR_BYTES) -> bytes:
        """The bytes of a small file in `folder`, checked against size and hash.

        Raises:
            CorruptionError: missing, larger than `max_bytes` or other bytes than its reference names.
        """
        where = f"{folder}/{ref.name}"
        if ref.num_bytes > (most := min(max_bytes, MAX_SIDECAR_BYTES)):
            raise CorruptionError(f"{where}: must be at most {most} bytes, found {ref.num_bytes}")
        data, digest = self._read(folder, ref)
        if self.mirror and digest != ref.sha256:
            self.mirror.drop(folder, ref)
            data, digest = self._read(folder, ref)
        if digest != ref.sha256 or len(data) != ref.num_bytes:
            must = f"must have {ref.num_bytes} bytes with SHA-256 {ref.sha256[:16]}"
            found = f"found {len(data)} with {digest[:16]}"
            raise CorruptionError(f"{where}: {must}, {found}; restore it from its source")
        return data

    def fetch(self, folder: str, ref: FileRef) -> None:
        """Brings a file here if the cache lies in object storage.

        Raises:
            CorruptionError, CacheError: as `Mirror.fetch`.
        """
        if self.mirror:
            self.mirror.fetch(folder, ref)

    def _read(self, folder: str, ref: FileRef) -> tuple[bytes, str]:
        """A small file and its SHA-256."""
        self.fetch(folder, ref)
        check_folder(self.root / folder)
        data = read_plain(self.root / folder / ref.name, max_bytes=ref.num_bytes)
        return data, hashlib.sha256(data).hexdigest()

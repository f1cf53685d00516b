"""A local, bounded copy of a cache in object storage: files come when they are first needed.

Costs one listing and the small files at opening, then each shard once as long as the mirror has room; the
shards used longest ago leave first. Everything is checked against the hashes of the commit records. Several
processes may share a mirror.
"""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from pmetal_distill.home import cache_home
from pmetal_distill.offline.commit import DATASET, failing_writes
from pmetal_distill.offline.remote import Listed, RemoteFolder
from schemas.errors import CorruptionError, UsageError
from schemas.manifest import MAX_DATASET_BYTES, MAX_RECORD_BYTES, FileRef

DEFAULT_BYTES = 32 << 30
VARIABLE = "PMETAL_MIRROR_GB"
_OLD_SECONDS = 24 * 3600
_RECORDS, _SHARDS = "commits", "shards"


class Mirror:
    """The local side of a remote cache.

    Args:
        url: of the cache.
        root: where the copy lies; a folder of its own in `cache_home()` if None.
        limit_bytes: room for shards; $PMETAL_MIRROR_GB, else 32 GiB, if None. The shard in use stays.
        told: hears of attempts that failed.

    Raises:
        UsageError: a URL that nothing installed can open, or not a cache.
        CacheError: the storage does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        root: Path | None = None,
        limit_bytes: int | None = None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self.remote = RemoteFolder(url, told=told)
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.root = root or cache_home() / "mirrors" / name
        self._limit = _room() if limit_bytes is None else limit_bytes
        with failing_writes(f"{self.remote.name}: its local copy"):
            self._refresh()

    def fetch(self, folder: str, ref: FileRef) -> None:
        """Makes sure that a file is here; a file of another size is fetched again.

        Raises:
            CorruptionError: missing in the storage, or other bytes than the commit record names.
            CacheError: the storage does not answer, or the disk is full.
        """
        target = self.root / folder / ref.name
        with contextlib.suppress(OSError):
            status = target.stat()
            if status.st_size == ref.num_bytes:
                os.utime(target, ns=(time.time_ns(), status.st_mtime_ns))
                return
        with failing_writes(f"{folder}/{ref.name}"):
            self._make_room(folder, ref)
            draft = self._draft(ref.name)
            self.remote.download(f"{folder}/{ref.name}", ref, draft)
            draft.replace(target)

    def drop(self, folder: str, ref: FileRef) -> None:
        """Forgets a file whose bytes have turned out wrong."""
        (self.root / folder / ref.name).unlink(missing_ok=True)

    def _refresh(self) -> None:
        """Dataset and commit records as they are now; of another data set nothing old is kept."""
        found = self.remote.stat(DATASET)
        if found is None:
            raise UsageError(f"{self.remote.name}: must be a cache, found no {DATASET}; check the URL")
        for folder in (_SHARDS, _RECORDS, "bases", "tokenizer", "_tmp"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        _remove_old(self.root / "_tmp")
        data = self.remote.read(DATASET, max_bytes=MAX_DATASET_BYTES)
        known = self.root / DATASET
        if not known.exists() or known.read_bytes() != data:
            for path in (p for f in (_RECORDS, _SHARDS, "tokenizer") for p in (self.root / f).iterdir()):
                path.unlink(missing_ok=True)
            self._put(known, data)
        self._refresh_records()

    def _refresh_records(self) -> None:
        listed = {item.name: item for item in self.remote.list(_RECORDS)}
        here = {path.name: path for path in (self.root / _RECORDS).iterdir()}
        for name in here.keys() - listed.keys():
            here[name].unlink(missing_ok=True)
        for name, item in listed.items():
            if name in here and _same(here[name], item):
                continue
            if item.num_bytes > MAX_RECORD_BYTES:
                raise CorruptionError(f"{_RECORDS}/{name}: must be at most {MAX_RECORD_BYTES} bytes")
            data = self.remote.read(f"{_RECORDS}/{name}", max_bytes=MAX_RECORD_BYTES)
            self._put(self.root / _RECORDS / name, data, modified=item.modified)

    def _put(self, target: Path, data: bytes, *, modified: int | None = None) -> None:
        draft = self._draft(target.name)
        draft.write_bytes(data)
        if modified:
            os.utime(draft, ns=(modified, modified))
        draft.replace(target)

    def _draft(self, name: str) -> Path:
        return self.root / "_tmp" / f"{secrets.token_hex(6)}-{name}"

    def _make_room(self, folder: str, ref: FileRef) -> None:
        """Removes the shards read longest ago; files that somebody has open stay readable to them."""
        if folder != _SHARDS:
            return
        kept = []
        for path in (self.root / _SHARDS).iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                kept.append((status.st_atime_ns, status.st_size, path))
        room = self._limit - ref.num_bytes - sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if room >= 0:
                return
            path.unlink(missing_ok=True)
            room += size


def _remove_old(folder: Path) -> None:
    """Removes drafts that a killed process has left."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD_SECONDS:
                path.unlink()


def _same(path: Path, item: Listed) -> bool:
    status = path.stat()
    return bool(item.modified) and (status.st_size, status.st_mtime_ns) == (item.num_bytes, item.modified)


def _room() -> int:
    text = os.environ.get(VARIABLE)
    if text is None:
        return DEFAULT_BYTES
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < 1e9:
        raise UsageError(f"{VARIABLE}: must be a number of gigabytes, found {text!r}; 32 is usual")
    return int(gigabytes * 1e9)

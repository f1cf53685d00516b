"""Whole caches to and from object storage. Costs each file once, hashed on the way; both can be repeated.

Files whose names carry their hash go first, `dataset.json` after them and the commit records last, so that a
reader never meets a record without its files. What is already there is not moved again.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pmetal_distill.offline.commit import flush_folder, open_plain
from pmetal_distill.offline.mirror import Mirror
from pmetal_distill.offline.remote import RemoteFolder
from pmetal_distill.offline.store import DATASET, Store
from schemas.errors import CorruptionError, UsageError
from schemas.manifest import FileRef

_CHUNK = 1 << 20
_NO_LIMIT = 1 << 62
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer did.

    Attributes:
        files, num_bytes: moved.
        present: files that were there already.
        shards: committed shards of the cache as it was read.
    """

    files: int
    num_bytes: int
    present: int
    shards: int


def _nothing(_: int) -> None:
    pass


def files_of(store: Store) -> dict[str, FileRef]:
    """Every file that the commit records and the dataset name, by path; the order of transfer."""
    records = [store.record(shard) for shard in store.committed()]
    files = {path: ref for record in records for path, ref in record.files().items()}
    return files | {f"tokenizer/{ref.name}": ref for ref in store.dataset.tokenizer}


def push(cache: Path, url: str, *, progress: Progress = _nothing) -> Transferred:
    """Copies a cache folder, complete or not, to object storage.

    Args:
        cache: the folder.
        url: where it goes; a folder that is empty or holds the same data set.
        progress: is told the bytes of every file that is done.

    Raises:
        CorruptionError: a file is not the one that was committed; run `verify`.
        UsageError: another data set lies there.
        CacheError: the storage does not take it.
    """
    store, remote = Store.open(cache), RemoteFolder(url)
    found = remote.stat(DATASET)
    known = (cache / DATASET).read_bytes()
    if found and remote.read(DATASET, max_bytes=found.num_bytes) != known:
        raise UsageError(
            f"{remote.name}: must be empty or hold this data set, found another; choose another URL"
        )
    moved, num_bytes, present = 0, 0, 0
    for path, ref in files_of(store).items():
        there = remote.stat(path)
        if there and there.num_bytes == ref.num_bytes:
            present += 1
        else:
            _upload(remote, cache, path, ref)
            moved, num_bytes = moved + 1, num_bytes + ref.num_bytes
        progress(ref.num_bytes)
    shards = store.committed()
    small = [DATASET, *(f"commits/{store.record_path(shard).name}" for shard in shards)]
    for path in small:
        data = (cache / path).read_bytes()
        remote.upload(path, partial(_once, data))
    return Transferred(moved + len(small), num_bytes, present, len(shards))


class Pull:
    """A cache on its way from object storage into a local folder. Run it again after an interruption.

    Args:
        url: of the cache.
        cache: a new folder, or that of an earlier pull of the same data set.

    Attributes:
        num_bytes: of all files that the commit records name.

    Raises:
        UsageError: no cache at the URL, or the folder holds something else.
        CacheError: the storage does not answer, or the disk is full.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self._draft = cache / "_pull"
        used = cache.exists() and any(cache.iterdir())
        if used and not self._draft.exists() and not (cache / DATASET).exists():
            raise UsageError(
                f"{cache}: must be new, empty or an earlier pull, found other files; choose another folder"
            )
        self._cache = cache
        self._mirror = Mirror(url, root=self._draft, limit_bytes=_NO_LIMIT)
        self._source = Store.open(self._draft)
        self._files = files_of(self._source)
        self.num_bytes = sum(ref.num_bytes for ref in self._files.values())
        _refuse_other(cache, self._draft)

    def run(self, *, progress: Progress = _nothing) -> Transferred:
        """Fetches what is missing, publishes the commit records last.

        Raises:
            CorruptionError: missing or other bytes than the commit records name.
            CacheError: the storage does not answer, or the disk is full.
        """
        moved, num_bytes, present = 0, 0, 0
        for path, ref in self._files.items():
            if self._fetch(path, ref):
                moved, num_bytes = moved + 1, num_bytes + ref.num_bytes
            else:
                present += 1
            progress(ref.num_bytes)
        shards = self._source.committed()
        _publish(self._draft, self._cache)
        return Transferred(moved + 1 + len(shards), num_bytes, present, len(shards))

    def _fetch(self, path: str, ref: FileRef) -> bool:
        folder, _, name = path.partition("/")
        target = self._cache / folder / name
        if target.exists() and target.stat().st_size == ref.num_bytes:
            return False
        self._mirror.fetch(folder, ref)
        target.parent.mkdir(exist_ok=True)
        (self._draft / folder / name).replace(target)
        return True


def _once(data: bytes) -> Iterator[bytes]:
    yield data


def _refuse_other(cache: Path, draft: Path) -> None:
    known = cache / DATASET
    if known.exists() and known.read_bytes() != (draft / DATASET).read_bytes():
        shutil.rmtree(draft)
        raise UsageError(
            f"{cache}: must be new or hold the same data set, found another; choose another folder"
        )


def _publish(draft: Path, cache: Path) -> None:
    for folder in ("shards", "bases", "commits"):
        (cache / folder).mkdir(exist_ok=True)
        flush_folder(cache / folder)
    (draft / DATASET).replace(cache / DATASET)
    for path in sorted((draft / "commits").iterdir()):
        path.replace(cache / "commits" / path.name)
    flush_folder(cache / "commits")
    flush_folder(cache)
    shutil.rmtree(draft)


def _upload(remote: RemoteFolder, cache: Path, path: str, ref: FileRef) -> None:
    """Uploads a file under its name, which nobody trusts before the record is there; checks what was read."""
    digest = hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        nonlocal digest
        digest = hashlib.sha256()
        with open_plain(cache / path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                yield chunk

    remote.upload(path, chunks)
    if digest.hexdigest() != ref.sha256:
        raise CorruptionError(
            f"{path}: must have the bytes that its commit record names, found others; "
            "run 'pmetal-pipeline verify'"
        )

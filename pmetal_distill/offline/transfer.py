"""Whole caches to and from object storage. Each file is hashed before it goes and after it has come.

Files whose names carry their hash go first, `dataset.json` after them and the commit records last, so that a
reader never meets a record without its files. What is already there is compared, not believed: an object with
other bytes is replaced. Both can be repeated. Costs a read of every file, and of every object that the store
has no checksum of; eight files are under way at a time, as a small one is all waiting.
"""

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pmetal_distill.offline.commit import flush_folder, hash_stream, open_plain
from pmetal_distill.offline.mending import dataset_of_record, recorded_checksum, replace_file
from pmetal_distill.offline.mirror import Mirror
from pmetal_distill.offline.remote import Listed, RemoteFolder
from pmetal_distill.offline.store import DATASET, SPARE, Store
from schemas.errors import CorruptionError, PmetalError, UsageError
from schemas.manifest import MAX_DATASET_BYTES, MAX_RECORD_BYTES, Dataset, FileRef, checksum_of

AT_ONCE = 8
_CHUNK = 1 << 20
_NO_LIMIT = 1 << 62
Progress = Callable[[int], None]
Told = Callable[[str], None]


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


_FOLDERS = ("shards", "bases", "tokenizer")


def _nothing(_: int) -> None:
    pass


def files_of(store: Store) -> dict[str, FileRef]:
    """Every file that the commit records and the dataset name, by path; the order of transfer."""
    records = [store.record(shard) for shard in store.committed()]
    files = {path: ref for record in records for path, ref in record.files().items()}
    return files | {f"tokenizer/{ref.name}": ref for ref in store.dataset.tokenizer}


def push(cache: Path, url: str, *, progress: Progress = _nothing, told: Told | None = None) -> Transferred:
    """Copies a cache folder, complete or not, to object storage.

    Args:
        cache: the folder.
        url: where it goes; a folder that is empty or holds the same data set.
        progress: is told bytes as they have gone, or are found to be there.
        told: hears of attempts that failed.

    Raises:
        CorruptionError: a file is not the one that was committed; run `verify`. It is not sent.
        UsageError: another data set lies there.
        CacheError: the storage does not take it.
    """
    store, remote = Store.open(cache), RemoteFolder(url, told=told)
    _refuse_other_remote(remote, store)
    files, shards = files_of(store), store.committed()
    there = {f"{folder}/{item.name}": item for folder in _FOLDERS for item in remote.list(folder)}
    sender = _Sender(remote, cache, there, _Counter(progress))
    sent = _together(partial(sender.send, path, ref) for path, ref in files.items())
    _refuse_other_remote(remote, store)  # of two that were begun at once, one stops here or below
    sender.send_small(DATASET)
    _refuse_other_remote(remote, store)
    _together(partial(sender.send_small, f"commits/{store.record_path(shard).name}") for shard in shards)
    moved = [ref.num_bytes for new, ref in zip(sent, files.values(), strict=True) if new]
    return Transferred(len(moved) + 1 + len(shards), sum(moved), len(files) - len(moved), len(shards))


@dataclass(frozen=True, slots=True)
class _Sender:
    """One push: where it goes, what lay there when it began."""

    remote: RemoteFolder
    cache: Path
    there: dict[str, Listed]
    count: "_Counter"

    def send(self, path: str, ref: FileRef) -> bool:
        """Sees that a file is there; False if it was. What is damaged here is not sent."""
        with open_plain(self.cache / path) as file:
            if hash_stream(file) != ref.sha256:
                raise CorruptionError(_changed(path))
        known = self.there.get(path)
        same = known is not None and known.num_bytes == ref.num_bytes
        if same and self.remote.holds(path, ref, partial(_chunks, self.cache / path)):
            self.count.add(ref.num_bytes)
            return False
        self.remote.upload(path, partial(self._counted, path, ref))
        return True

    def send_small(self, path: str) -> None:
        """A record or the dataset, which has been read and is small, over what is there."""
        data = (self.cache / path).read_bytes()
        self.remote.upload(path, partial(_once, data))

    def _counted(self, path: str, ref: FileRef) -> Iterator[bytes]:
        """The bytes of a file, counted once however often they are sent, and hashed again as they go."""
        digest, sent = hashlib.sha256(), 0
        for chunk in _chunks(self.cache / path):
            digest.update(chunk)
            self.count.reached(path, sent := sent + len(chunk))
            yield chunk
        if digest.hexdigest() != ref.sha256:
            raise CorruptionError(_changed(path))


class _Counter:
    """Tells progress in bytes, from several threads, without counting a second attempt."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._reached: dict[str, int] = {}

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._progress(num_bytes)

    def reached(self, path: str, num_bytes: int) -> None:
        with self._lock:
            before = self._reached.get(path, 0)
            if num_bytes > before:
                self._reached[path] = num_bytes
                self._progress(num_bytes - before)


class Pull:
    """A cache on its way from object storage into a local folder. Run it again after an interruption.

    Args:
        url: of the cache.
        cache: a new folder, or that of an earlier pull of the same data set.
        told: hears of attempts that failed.

    Attributes:
        num_bytes: of all files that the commit records name.

    Raises:
        UsageError: no cache at the URL, or the folder holds something else.
        CacheError: the storage does not answer, or the disk is full.
    """

    def __init__(self, url: str, cache: Path, *, told: Told | None = None) -> None:
        self._draft = cache / "_pull"
        used = cache.exists() and any(cache.iterdir())
        if used and not self._draft.exists() and not (cache / DATASET).exists():
            raise UsageError(
                f"{cache}: must be new, empty or an earlier pull, found other files; choose another folder"
            )
        self._cache = cache
        self._mirror = Mirror(url, root=self._draft, limit_bytes=_NO_LIMIT, told=told)
        self._source = Store.open(self._draft)
        self._files = files_of(self._source)
        self.num_bytes = sum(ref.num_bytes for ref in self._files.values())
        _refuse_other(cache, self._draft)

    def run(self, *, progress: Progress = _nothing) -> Transferred:
        """Fetches what is missing or damaged, publishes the commit records last.

        Raises:
            CorruptionError: missing or other bytes than the commit records name.
            CacheError: the storage does not answer, or the disk is full.
        """
        count = _Counter(progress)
        came = _together(partial(self._bring, path, ref, count) for path, ref in self._files.items())
        moved = [ref.num_bytes for new, ref in zip(came, self._files.values(), strict=True) if new]
        shards = self._source.committed()
        _publish(self._draft, self._cache)
        present = len(self._files) - len(moved)
        return Transferred(len(moved) + 1 + len(shards), sum(moved), present, len(shards))

    def _bring(self, path: str, ref: FileRef, count: _Counter) -> bool:
        folder, _, name = path.partition("/")
        target = self._cache / folder / name
        if new := not _is_file(target, ref):
            self._mirror.drop(folder, ref)  # of a pull that was killed; nobody has looked at its bytes since
            self._mirror.fetch(folder, ref)
            target.parent.mkdir(exist_ok=True)
            (self._draft / folder / name).replace(target)
        count.add(ref.num_bytes)
        return new


def _together(calls: "Iterable[Callable[[], bool | None]]") -> Sequence[bool | None]:
    """Results in order of calls made `AT_ONCE` at a time; the first error ends what has not begun."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures: list[Future[bool | None]] = [pool.submit(call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]


def _is_file(path: Path, ref: FileRef) -> bool:
    """Whether a plain file with the content that `ref` names lies there."""
    try:
        with open_plain(path) as file:
            return path.stat().st_size == ref.num_bytes and hash_stream(file) == ref.sha256
    except CorruptionError:
        return False


def _chunks(path: Path) -> Iterator[bytes]:
    with open_plain(path) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _changed(path: str) -> str:
    must = "must have the bytes that its commit record names"
    return f"{path}: {must}, found others; run 'pmetal-pipeline verify'"


def _once(data: bytes) -> Iterator[bytes]:
    yield data


def _refuse_other_remote(remote: RemoteFolder, store: Store) -> None:
    """Refuses a place of another data set; a damaged `dataset.json` is ours if a record there says so."""
    found = remote.stat(DATASET)
    if found is None:
        return
    data = b""
    if found.num_bytes <= MAX_DATASET_BYTES:
        data = remote.read(DATASET, max_bytes=MAX_DATASET_BYTES)
    if data == (store.root / DATASET).read_bytes():
        return
    if not _is_sound(data):
        for item in remote.list("commits"):
            if item.num_bytes > MAX_RECORD_BYTES:
                continue
            named = dataset_of_record(remote.read(f"commits/{item.name}", max_bytes=MAX_RECORD_BYTES))
            if named == store.checksum:
                return
    raise UsageError(f"{remote.name}: must be empty or hold this data set, found another; choose another URL")


def _refuse_other(cache: Path, draft: Path) -> None:
    """Refuses a folder of another data set; a damaged `dataset.json` is ours if the records say so."""
    known = cache / DATASET
    if not known.exists() or known.read_bytes() == (draft / DATASET).read_bytes():
        return
    ours = checksum_of((draft / DATASET).read_bytes())
    if not _is_sound(known.read_bytes()) and recorded_checksum(cache / "commits") == ours:
        return
    shutil.rmtree(draft)
    raise UsageError(f"{cache}: must be new or hold the same data set, found another; choose another folder")


def _is_sound(data: bytes) -> bool:
    try:
        Dataset.from_bytes(data, where=DATASET)
    except PmetalError:
        return False
    return True


def _publish(draft: Path, cache: Path) -> None:
    for folder in ("shards", "bases", "commits"):
        (cache / folder).mkdir(exist_ok=True)
        flush_folder(cache / folder)
    (draft / DATASET).replace(cache / DATASET)
    for path in sorted((draft / "commits").iterdir()):
        path.replace(cache / "commits" / path.name)
    flush_folder(cache / "commits")
    replace_file(cache / SPARE, (cache / DATASET).read_bytes(), draft)
    flush_folder(cache)
    shutil.rmtree(draft)

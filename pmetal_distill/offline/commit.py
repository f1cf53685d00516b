"""Files that appear whole or not at all, on a local file system, under SIGKILL and with several writers.

A file is written under `_tmp/`, flushed to the medium, linked or renamed to its final name, and the folder is
flushed. Cost: two fsyncs a file (milliseconds on a disk).
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pmetal_distill.plain_files import open_regular
from schemas.errors import CacheError, CorruptionError, PmetalError

TMP = "_tmp"
DATASET = "dataset.json"
_LOCK_NAME = re.compile(r"[0-9a-f]{32}\.lock")
_CHUNK = 1 << 20
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class Scratch:
    """A private folder under `_tmp/` for the life of a writer, recognisably dead when its process is gone.

    A lock file is held with `flock`, which the kernel releases with the process; whoever can take the lock of
    another scratch knows that its owner is dead and removes it. In a cache it also keeps `repair` out.

    Raises:
        CorruptionError: `_tmp` is a link, so that cleaning would reach outside `root`.
        CacheError: a repair is at work on this cache.
    """

    def __init__(self, root: Path) -> None:
        tmp = root / TMP
        with suppress(FileExistsError):
            tmp.mkdir()
        check_folder(tmp)
        self._guard = guard(root, exclusive=False)
        try:
            _clean_dead(tmp)
            self._lock, self._lock_path = _new_lock(tmp)
        except BaseException:
            release(self._guard)
            raise
        self.folder = self._lock_path.with_suffix("")
        try:
            self.folder.mkdir()
        except BaseException:
            self.close()
            raise

    def path(self, name: str) -> Path:
        """A fresh path in the scratch folder."""
        return self.folder / f"{uuid.uuid4().hex[:8]}-{name}"

    def close(self) -> None:
        """Remove the folder and give up the lock; what a failing disk leaves, the next writer removes."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)
        release(self._guard)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _new_lock(tmp: Path) -> tuple[int, Path]:
    """A new lock file that this process holds; a cleaner may remove it before it is locked: retry."""
    while True:
        path = tmp / f"{uuid.uuid4().hex}.lock"
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink == 1:
                return handle, path
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _clean_dead(tmp: Path) -> None:
    for path in tmp.iterdir():
        if _LOCK_NAME.fullmatch(path.name):
            with suppress(OSError):
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def guard(root: Path, *, exclusive: bool) -> int | None:
    """A lock on a cache that its process holds until `release`: shared by writers, exclusive for a repair.

    Returns:
        what `release` takes; None where there is no cache yet.

    Raises:
        CacheError: held in the other way by another process.
    """
    try:
        handle = os.open(
            root / DATASET, (os.O_RDWR if exclusive else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(
            f"{root.name}/{DATASET}: must be a plain usable file, found {error.strerror}"
        ) from error
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        found = "another process writing or repairing it" if exclusive else "'pmetal-pipeline repair' at work"
        raise CacheError(
            f"{root.name}: nobody else must work on the cache, found {found}; wait for it"
        ) from error
    except OSError:
        os.close(handle)
        raise
    return handle


def release(handle: int | None) -> None:
    """Give a lock of `guard` back."""
    if handle is not None:
        os.close(handle)


def flush_file(handle: BinaryIO) -> None:
    """Force a file's bytes to the medium; on macOS `fsync` alone stops at the drive's cache."""
    handle.flush()
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        os.fsync(handle.fileno())
    else:
        fcntl.fcntl(handle.fileno(), full_sync)


def flush_folder(folder: Path) -> None:
    """Force a folder's entries to the medium."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_scratch(scratch: Scratch, name: str, data: bytes) -> Path:
    """A flushed scratch file with this content."""
    path = scratch.path(name)
    with path.open("xb") as handle:
        handle.write(data)
        flush_file(handle)
    return path


def put_if_absent(source: Path, target: Path) -> bool:
    """Publish `source` as `target` unless it exists; exactly one of several writers gets True.

    Raises:
        CacheError: the file system has no hard links (exFAT, some network mounts).
    """
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        must = "the file system must support hard links"
        raise CacheError(f"{target.name}: {must}, found {error}; write the cache to a local disk") from error
    flush_folder(target.parent)
    return True


def move(source: Path, target: Path) -> None:
    """Rename onto a content-hashed name: replacing an equal file changes nothing."""
    source.replace(target)
    flush_folder(target.parent)


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading; never follows a link, never blocks on a pipe.

    Raises:
        CorruptionError: missing, a link, or not a regular file.
    """
    try:
        return open_regular(path, follow_links=False)
    except OSError as error:
        raise CorruptionError(
            f"{_place(path)}: must be a plain readable file, found {error.strerror}"
        ) from error


def read_plain(path: Path, *, max_bytes: int) -> bytes:
    """The content of a small regular file.

    Raises:
        CorruptionError: as `open_plain`, or larger than `max_bytes`.
    """
    with open_plain(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        data = handle.read(size + 1) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        raise CorruptionError(f"{_place(path)}: must be at most {max_bytes} bytes, found more")
    return data


def hash_stream(handle: BinaryIO) -> str:
    """SHA-256 hex of an open file from its start to the end it has now; leaves it rewound."""
    left = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (chunk := handle.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    handle.seek(0)
    return digest.hexdigest()


def check_folder(path: Path) -> None:
    """Refuse a linked or missing folder inside a cache.

    Raises:
        CorruptionError: not a real folder.
    """
    if path.is_symlink() or not path.is_dir():
        must = "must be a folder inside the cache"
        raise CorruptionError(f"{_place(path)}: {must}, found a link, a file or nothing; remove it")


@contextmanager
def failing_writes(what: str, *, error: type[PmetalError] = CacheError) -> Iterator[None]:
    """Turn an operating system error into one that says what was being written and what to do.

    Raises:
        PmetalError: `error`, instead of OSError.
    """
    try:
        yield
    except OSError as found:
        advice = "free space or fix the disk, then run the same command with --resume"
        raise error(f"{what}: must be written in full, found {found}; {advice}") from found


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"

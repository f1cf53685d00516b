"""Folders behind a URL: s3://, gs://, hf:// and whatever else pyarrow or an installed fsspec knows.

Credentials, region and end point come from the environment or the URL, as pyarrow.fs defines them
(`s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`). Every call is tried a few times.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from pmetal_distill.offline.commit import flush_file
from schemas.errors import CacheError, CorruptionError, UsageError
from schemas.manifest import PLAIN_NAME, FileRef

ATTEMPTS = 5
FIRST_DELAY_SECONDS = 0.2
_CHUNK = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_SECRET = re.compile(r"//[^/@]*@|\?.*$")
T = TypeVar("T")


def is_url(place: object) -> bool:
    """Whether a place is behind a URL and not a local path."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


@dataclass(frozen=True, slots=True)
class Listed:
    """A file in a listing.

    Attributes:
        name: inside its folder.
        num_bytes: size.
        modified: nanoseconds since 1970; 0 where the storage does not say.
    """

    name: str
    num_bytes: int
    modified: int


class RemoteFolder:
    """A folder of files in object storage.

    Args:
        url: of the folder.

    Raises:
        UsageError: a URL that nothing installed can open.
    """

    def __init__(self, url: str) -> None:
        self.name = _SECRET.sub(lambda found: "//" if found.group().startswith("//") else "", url)
        self._files, self._root = _open(url, self.name)

    def list(self, folder: str) -> list[Listed]:
        """Plainly named files in a sub-folder; none if it does not exist.

        Raises:
            CacheError: the storage does not answer.
        """
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self._retried(f"list {folder}", lambda: self._files.get_file_info(selector))
        return [
            Listed(info.base_name, info.size, info.mtime_ns or 0)
            for info in found
            if info.type == fs.FileType.File and re.fullmatch(PLAIN_NAME, info.base_name)
        ]

    def stat(self, path: str) -> Listed | None:
        """One file, or None if there is none.

        Raises:
            CacheError: the storage does not answer.
        """
        info = self._retried(f"look at {path}", lambda: self._files.get_file_info(self._path(path)))
        return (
            Listed(info.base_name, info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None
        )

    def read(self, path: str, *, max_bytes: int) -> bytes:
        """A small file.

        Raises:
            CorruptionError: missing, or larger than `max_bytes`.
            CacheError: the storage does not answer.
        """

        def once() -> bytes:
            with self._files.open_input_stream(self._path(path)) as stream:
                return bytes(stream.read(max_bytes + 1))

        data = self._retried(f"read {path}", once)
        if len(data) > max_bytes:
            raise CorruptionError(f"{self.name}/{path}: must be at most {max_bytes} bytes, found more")
        return data

    def download(self, path: str, ref: FileRef, target: Path) -> None:
        """Writes a file of known content to `target`, which must not exist; bytes are flushed.

        Raises:
            CorruptionError: missing, or other bytes in every attempt.
            CacheError: the storage does not answer, or the disk is full.
        """

        def once() -> None:
            target.unlink(missing_ok=True)
            with self._files.open_input_stream(self._path(path)) as stream, target.open("xb") as file:
                found = _copy(iter(lambda: stream.read(_CHUNK), b""), file, most=ref.num_bytes)
                flush_file(file)
            if found != ref.sha256:
                raise _OtherBytesError(found)

        try:
            self._retried(f"fetch {path}", once)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def upload(self, path: str, data: Callable[[], Iterator[bytes]]) -> None:
        """Writes a file; an attempt that fails leaves the earlier content or nothing.

        Args:
            path: inside the folder.
            data: gives the content anew for every attempt.

        Raises:
            CacheError: the storage does not take it.
        """

        def once() -> None:
            self._files.create_dir(str(PurePosixPath(self._path(path)).parent), recursive=True)
            with self._files.open_output_stream(self._path(path)) as stream:
                for chunk in data():
                    stream.write(chunk)

        self._retried(f"write {path}", once)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        """Calls until it works; the delay doubles, with jitter, so that many readers do not beat in time."""
        delay = FIRST_DELAY_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except FileNotFoundError as error:
                raise CorruptionError(f"{self.name}: must be able to {what}, found no such file") from error
            except _OtherBytesError as error:
                if attempt == ATTEMPTS:
                    must = "must have the bytes that the commit record names"
                    raise CorruptionError(
                        f"{self.name}: {what}: {must}, found SHA-256 {error}; push the cache again"
                    ) from error
            except (OSError, pa.ArrowException) as error:
                if attempt == ATTEMPTS:
                    raise CacheError(
                        f"{self.name}: must be able to {what}, found {_first_line(error)} in {ATTEMPTS} "
                        "attempts; check connection, credentials and free space, then try again"
                    ) from error
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay *= 2
        raise AssertionError("unreachable")


class _OtherBytesError(Exception):
    """A download whose content is not the promised one; its text is the SHA-256 found."""


def _copy(chunks: Iterator[bytes], file: BinaryIO, *, most: int) -> str:
    """Writes chunks up to a byte more than `most`; SHA-256 of what came."""
    digest, total = hashlib.sha256(), 0
    for chunk in chunks:
        file.write(chunk)
        digest.update(chunk)
        total += len(chunk)
        if total > most:
            return f"of more than {most} bytes"
    return digest.hexdigest()


def _open(url: str, name: str) -> tuple[Any, str]:
    try:
        files, root = fs.FileSystem.from_uri(url)
    except (pa.ArrowException, ValueError, OSError) as error:
        return _open_by_fsspec(url, name, error)
    return files, root.rstrip("/")


def _open_by_fsspec(url: str, name: str, cause: Exception) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise UsageError(
            f"{name}: must be a URL that pyarrow or fsspec opens, found {_first_line(cause)} and "
            f"{_first_line(error)}; s3://bucket/folder, gs://... and hf://... are usual"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(files)), str(root).rstrip("/")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

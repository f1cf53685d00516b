"""Folders behind a URL: s3://, gs://, hf:// and whatever else pyarrow or an installed fsspec knows.

Credentials, region and end point come from the environment or the URL, as pyarrow.fs defines them
(`s3://bucket/folder?endpoint_override=localhost:9000&scheme=http`). Every call is tried a few times.
Writing a file of up to 5 MB costs one request on S3, comparing it one if its ETag is an MD5, else its read.
"""

import contextlib
import hashlib
import random
import re
import threading
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
_MIB = 1 << 20
_PART_BYTES = tuple(size * _MIB for size in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128))
_ETAG = re.compile(r'"?([0-9a-f]{32})(?:-([1-9][0-9]{0,4}))?"?')
_REFUSED = re.compile(
    "ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|"
    "SignatureDoesNotMatch|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|ExpiredToken|UNRECOGNIZED_CLIENT|"
    "MISSING_AUTHENTICATION_TOKEN|InvalidBucketName|HTTP status 40[13]|NO_SUCH_BUCKET|NoSuchBucket|"
    "bucket does not exist|Bucket '[^']*' not found"
)
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
        told: hears of every attempt that failed, in a few words.

    Raises:
        UsageError: a URL that nothing installed can open.
    """

    def __init__(self, url: str, *, told: Callable[[str], None] | None = None) -> None:
        self.name = _SECRET.sub(lambda found: "//" if found.group().startswith("//") else "", url)
        self._files, self._root = _open(url, self.name)
        self._told = told or (lambda _: None)
        self._made: set[str] = set()
        self._making = threading.Lock()

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

    def holds(self, path: str, ref: FileRef, data: Callable[[], Iterator[bytes]]) -> bool:
        """Whether a file that is there has the content that `ref` names.

        An ETag that is the MD5 of `data`, in one part or in parts of a usual size, says yes; any other says
        nothing, as encrypted objects have one, too, and the file is read.

        Args:
            path: of a file that exists.
            ref: its size and SHA-256.
            data: gives the content, which must be the one that `ref` names.

        Raises:
            CacheError: the storage does not answer.
        """

        def once() -> str:
            with self._files.open_input_stream(self._path(path)) as stream:
                return _copy(iter(lambda: stream.read(_CHUNK), b""), None, most=ref.num_bytes)

        try:
            etag = self._etag(path)
            if etag is not None and _is_etag_of(etag, ref.num_bytes, data):
                return True
            return self._retried(f"compare {path}", once) == ref.sha256
        except CorruptionError:  # removed since it was listed
            return False

    def upload(self, path: str, data: Callable[[], Iterator[bytes]]) -> None:
        """Writes a file over what is there; nothing of it stays if `data` fails.

        Args:
            path: inside the folder.
            data: gives the content anew for every attempt.

        Raises:
            CacheError: the storage does not take it.
        """

        def once() -> None:
            self._make(str(PurePosixPath(self._path(path)).parent))
            failed = None
            with self._files.open_output_stream(self._path(path)) as stream:
                chunks = data()
                while True:
                    # Closing the stream publishes what has been written: a source that fails must not.
                    try:
                        chunk = next(chunks, b"")
                    except Exception as error:  # noqa: BLE001 - raised again below
                        failed = error
                        break
                    if not chunk:
                        break
                    stream.write(chunk)
            if failed is not None:
                with contextlib.suppress(OSError):
                    self._files.delete_file(self._path(path))
                raise failed

        self._retried(f"write {path}", once)

    def _make(self, folder: str) -> None:
        """A folder (and the bucket, where the URL allows it), once: four requests on S3."""
        with self._making:
            if folder not in self._made:
                self._files.create_dir(folder, recursive=True)
                self._made.add(folder)

    def _etag(self, path: str) -> str | None:
        """What the store says of an object's content; None where it says nothing."""

        def once() -> Any:
            with self._files.open_input_stream(self._path(path)) as stream:
                return stream.metadata() or {}

        found = self._retried(f"look at {path}", once).get("ETag", b"")
        return found.decode("ascii", "replace") if isinstance(found, bytes) else str(found) or None

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _retried(self, what: str, call: Callable[[], T]) -> T:
        """Calls until it works; the delay doubles, with jitter, so that many readers do not beat in time."""
        delay = FIRST_DELAY_SECONDS
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except FileNotFoundError as error:
                # An upload whose answer was lost is tried again and finds that its parts are gone.
                if attempt == ATTEMPTS or not what.startswith("write ") or _REFUSED.search(str(error)):
                    raise self._missing(what, error) from error
            except _OtherBytesError as error:
                if attempt == ATTEMPTS:
                    must = "must have the bytes that the commit record names"
                    raise CorruptionError(
                        f"{self.name}: {what}: {must}, found SHA-256 {error}; push the cache again"
                    ) from error
            except (OSError, pa.ArrowException) as error:
                if _REFUSED.search(str(error)):
                    raise CacheError(
                        f"{self.name}: must be able to {what}, found {_first_line(error)}; check credentials "
                        "and bucket"
                    ) from error
                if attempt == ATTEMPTS:
                    raise CacheError(
                        f"{self.name}: must be able to {what}, found {_first_line(error)} in {ATTEMPTS} "
                        "attempts; check connection, credentials and free space, then try again"
                    ) from error
            self._told(f"{what}: attempt {attempt} of {ATTEMPTS} failed")
            time.sleep(delay * random.uniform(0.5, 1.0))
            delay *= 2
        raise AssertionError("unreachable")

    def _missing(self, what: str, error: FileNotFoundError) -> CacheError:
        """A file that is not there is damage; a bucket that is not there, or no place to write to, is not."""
        if what.startswith("write ") or _REFUSED.search(str(error)):
            return CacheError(
                f"{self.name}: must be able to {what}, found {_first_line(error)}; "
                "check credentials and bucket"
            )
        return CorruptionError(f"{self.name}: must be able to {what}, found no such file")


class _OtherBytesError(Exception):
    """A download whose content is not the promised one; its text is the SHA-256 found."""


def _copy(chunks: Iterator[bytes], file: BinaryIO | None, *, most: int) -> str:
    """Writes chunks, if there is a file, until they are more than `most` bytes; SHA-256 of what came."""
    digest, total = hashlib.sha256(), 0
    for chunk in chunks:
        if file is not None:
            file.write(chunk)
        digest.update(chunk)
        total += len(chunk)
        if total > most:
            return f"of more than {most} bytes"
    return digest.hexdigest()


def _is_etag_of(etag: str, num_bytes: int, data: Callable[[], Iterator[bytes]]) -> bool:
    """Whether an ETag of S3 is that of this content: its MD5, or the MD5 of the MD5s of N parts, and "-N"."""
    found = _ETAG.fullmatch(etag)
    if found is None:
        return False
    count = int(found.group(2) or 0)
    sizes = (
        {size for size in _PART_BYTES if -(-num_bytes // size) == count} if count > 1 else {num_bytes or 1}
    )
    return any(_etag_digest(size, count, data) == found.group(1) for size in sorted(sizes))


def _etag_digest(part_bytes: int, count: int, data: Callable[[], Iterator[bytes]]) -> str:
    parts, room = [hashlib.md5(usedforsecurity=False)], part_bytes
    for chunk in data():
        while chunk:
            if not room:
                parts.append(hashlib.md5(usedforsecurity=False))
                room = part_bytes
            parts[-1].update(chunk[:room])
            chunk, room = chunk[room:], max(room - len(chunk), 0)
    if not count:
        return parts[0].hexdigest()
    return hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False).hexdigest()


def _open(url: str, name: str) -> tuple[Any, str]:
    try:
        files, root = _open_by_pyarrow(url)
    except (pa.ArrowException, ValueError, OSError) as error:
        return _open_by_fsspec(url, name, error)
    return files, root.rstrip("/")


def _open_by_pyarrow(url: str) -> tuple[Any, str]:
    """On S3 a file begins when its first part is full: a small one is one request instead of three."""
    if url.lower().startswith("s3://") and "allow_delayed_open" not in url:
        with contextlib.suppress(pa.ArrowInvalid):
            opened: tuple[Any, str] = fs.FileSystem.from_uri(
                f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"
            )
            return opened
    files, root = fs.FileSystem.from_uri(url)
    return files, root


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

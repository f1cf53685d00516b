"""Numbers that only grow at their end: in memory while they are few, else in an unnamed file.

Costs memory for at most `MEMORY_BYTES` of each column, whatever it holds. The file has no name, so nothing of
it stays after a crash; it is read through a memory map.
"""

import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from schemas.errors import DataError

MEMORY_BYTES = 32 << 20
_WRITE_BYTES = 1 << 20

T = TypeVar("T", bound=np.generic)


class Column(Generic[T]):
    """Numbers of one type.

    Args:
        dtype: of the numbers.
        folder: where the file goes; the system's folder for such files ($TMPDIR) if None.
        memory_bytes: most that stays in memory.
    """

    def __init__(
        self, dtype: type[T], *, folder: Path | None = None, memory_bytes: int | None = None
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._folder = folder
        self._memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self._recent = bytearray()
        self._written = 0
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        """Adds numbers, as the bytes that they have in memory.

        Raises:
            DataError: the disk is full or the folder cannot be written to.
        """
        self._recent += data
        most = self._memory_bytes if self._file is None else min(self._memory_bytes, _WRITE_BYTES)
        if len(self._recent) > most:
            self._spill()

    def finish(self) -> NDArray[T]:
        """All numbers, to be read only; the column takes no more.

        Raises:
            DataError: as `write`.
        """
        if self._file is None:
            return np.frombuffer(self._recent, self._dtype)
        self._spill()
        return np.memmap(self._file, self._dtype, mode="r")

    def close(self) -> None:
        """Lets the file go; a map of it holds it open by itself."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Column[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = _unnamed_file(self._folder)
            rest = memoryview(self._recent)
            while rest:  # what is unbuffered may be written in parts
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            place = self._folder or tempfile.gettempdir()
            raise DataError(
                f"{place}: must take in the tokens of the text, found: {error.strerror or error} after "
                f"{self._written:,} bytes; free some, or choose a folder on another disk (--out, else TMPDIR)"
            ) from error
        self._written += len(self._recent)
        self._recent = bytearray()


def _unnamed_file(folder: Path | None) -> IO[Any]:
    return tempfile.TemporaryFile(dir=folder, prefix="tokens-", buffering=0)

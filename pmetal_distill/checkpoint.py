"""States of a training as files that appear whole or not at all, under SIGKILL and on a full disk.

A state is one safetensors file, `00000120-0f3a....safetensors`: its number, and the start of the SHA-256 of
its bytes. The arrays are the training's, the metadata key "record" is JSON. Writing costs a hash on the way
(1 GB/s) and two fsyncs, reading a hash.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx

from pmetal_distill.offline.commit import (
    Scratch,
    failing_writes,
    flush_file,
    flush_folder,
    hash_stream,
    move,
    open_plain,
)
from schemas.errors import CheckpointError, CorruptionError
from schemas.strict import dump_object, parse_object

RECORD = "record"
MAX_RECORD_BYTES = 1 << 24
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{16})\.safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """All that a training needs to go on.

    Attributes:
        arrays: by name.
        record: what JSON can hold.
    """

    arrays: Mapping[str, mx.array]
    record: Mapping[str, Any]

    def part(self, name: str) -> dict[str, mx.array]:
        """The arrays whose names begin with `name.`, without that."""
        prefix = name + "."
        return {key[len(prefix) :]: a for key, a in self.arrays.items() if key.startswith(prefix)}


@dataclass(frozen=True, slots=True, order=True)
class StateFile:
    """A state on disk, unread.

    Attributes:
        number: of the step it was written after.
        path: the file.
    """

    number: int
    path: Path

    def read(self) -> TrainingState:
        """The state, after its hash was checked.

        Raises:
            CorruptionError: other bytes than were written, or bytes that are no state.
        """
        with open_plain(self.path) as handle:
            digest, wanted = hash_stream(handle), self.path.stem.partition("-")[2]
        where = f"{self.path.parent.name}/{self.path.name}"
        if not digest.startswith(wanted):
            raise CorruptionError(
                f"{where}: must have the SHA-256 that its name begins, found {digest[:16]}; remove the file"
            )
        try:
            arrays, metadata = cast(
                tuple[dict[str, mx.array], dict[str, str]], mx.load(str(self.path), return_metadata=True)
            )
            mx.eval(arrays)
            text = metadata[RECORD].encode()
        except (RuntimeError, KeyError, ValueError) as error:
            raise CorruptionError(
                f"{where}: must be a training state, found {error}; remove the file"
            ) from error
        record = parse_object(text, where=where, max_bytes=MAX_RECORD_BYTES)
        return TrainingState(arrays, record)


def list_states(folder: Path) -> list[StateFile]:
    """The states in a folder, oldest first; of files written under the same number, in the order of names."""
    if not folder.is_dir():
        return []
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir())
    return sorted(StateFile(int(match.group(1)), path) for path, match in found if match)


def write_state(folder: Path, number: int, state: TrainingState) -> StateFile:
    """Writes a state; when this returns, it is on the medium.

    Raises:
        CheckpointError: the disk is full or fails; nothing in `folder` has changed.
    """
    with failing_writes(f"{folder.name}/{number:08d}", error=CheckpointError):
        folder.mkdir(exist_ok=True)
        with Scratch(folder) as scratch:
            draft = scratch.path("state.safetensors")
            digest = _write_draft(draft, state)
            path = folder / f"{number:08d}-{digest[:16]}.safetensors"
            move(draft, path)
    return StateFile(number, path)


def remove_states(files: list[StateFile]) -> None:
    """Removes states; one that is gone already is no error."""
    for file in files:
        file.path.unlink(missing_ok=True)
        flush_folder(file.path.parent)


def _write_draft(path: Path, state: TrainingState) -> str:
    """Writes the file and flushes it; its SHA-256."""
    record = dump_object(dict(state.record)).decode()
    with path.open("xb") as handle:
        hashed = _HashedFile(handle)
        mx.save_safetensors(hashed, dict(state.arrays), metadata={"format": "mlx", RECORD: record})  # type: ignore[arg-type]
        flush_file(handle)
    return hashed.digest.hexdigest()


class _HashedFile:
    """A file object for `mx.save_safetensors`, which writes from front to back."""

    closed = False

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._handle.write(data)

    def tell(self) -> int:
        return self._handle.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def writable(self) -> bool:
        return True

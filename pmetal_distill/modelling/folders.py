"""Output folders that appear whole or not at all. Costs one rename."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import UsageError

_DRAFT = re.compile(r"\..+\.[0-9a-f]{12}\.part")


def require_unused(folder: Path) -> None:
    """Raises UsageError unless `folder` is missing or an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if os.path.lexists(folder):
        raise UsageError(f"{folder}: the output folder must not exist yet; name another or remove it")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `folder`, renamed to `folder` at the end.

    Files are flushed to disk before the rename. On any exception the temporary folder is removed and
    `folder` is not touched. What killed processes have left beside it is removed on the way.

    Raises:
        UsageError: `folder` is in use, before or at the time of the rename, or cannot be made.
        OSError: the disk is full or fails, also where MLX says so in a RuntimeError.
    """
    require_unused(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        draft, lock = _new_draft(folder)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made ({error.strerror}); name a folder you can write to"
        ) from error
    try:
        yield draft
        _publish(draft, folder)
    except RuntimeError as error:
        if "[write]" not in str(error):
            raise
        raise OSError(errno.EIO, f"could not be written in full ({error})", str(folder)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _new_draft(folder: Path) -> tuple[Path, int]:
    """A temporary folder and a lock on it, which the kernel gives up with the process."""
    while True:
        draft = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.part"
        draft.mkdir()
        with contextlib.suppress(FileNotFoundError):  # taken for abandoned before it was locked
            handle = os.open(draft, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a disk without locks: nothing is taken for abandoned there
                fcntl.flock(handle, fcntl.LOCK_EX)
            if draft.exists():
                return draft, handle
            os.close(handle)


def _remove_abandoned(parent: Path) -> None:
    """Removes drafts whose process is gone: those whose lock can be had."""
    for path in parent.iterdir():
        if not _DRAFT.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            continue
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _publish(draft: Path, folder: Path) -> None:
    for path in draft.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    try:
        draft.rename(folder)
    except OSError:
        require_unused(folder)
        raise

"""Output folders that appear whole or not at all. Costs one rename."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from schemas.errors import UsageError


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
    `folder` is not touched.

    Raises:
        UsageError: `folder` is in use, before or at the time of the rename, or cannot be made.
    """
    require_unused(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.part"
        draft.mkdir()
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be made ({error.strerror}); name a folder you can write to"
        ) from error
    try:
        yield draft
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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

"""Opening files that somebody else may have put there. Costs one more system call than `open`."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from schemas.errors import DataError


def open_regular(path: Path, *, follow_links: bool = True) -> BinaryIO:
    """Opens a regular file for reading; never waits for the other end of a pipe.

    Raises:
        OSError: missing, unreadable, or not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a folder, pipe or device", str(path))
    return os.fdopen(handle, "rb")


def is_device(path: Path) -> bool:
    """Whether something is there, or behind a link, that is neither a file nor a folder: a pipe, a device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_lengths(record: Mapping[str, Any], *, where: str, most: int) -> None:
    """Refuses texts of more than `most` characters: a kilobyte of a packed file may hold a gigabyte of one.

    Raises:
        DataError: names the place and the column.
    """
    for name, value in record.items():
        if isinstance(value, str) and len(value) > most:
            raise DataError(
                f"{where}: a text must have at most {most:,} characters, found {len(value):,} in {name!r}; "
                "split it into documents"
            )


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or something else; says which.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except ValueError as error:
        raise ValueError("nothing" if not data else f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value

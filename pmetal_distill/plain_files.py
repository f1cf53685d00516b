"""Opening files that somebody else may have put there. Costs one more system call than `open`."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


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

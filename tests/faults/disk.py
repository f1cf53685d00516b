"""A disk that fails, tears, kills or dawdles at a chosen one of the places where something is written.

`Disk` counts every call that changes a file or folder below a root, in whatever thread: files opened for
writing, their writes and flushes, and the calls of `os` that make, link, rename, remove or flush. The n-th
(from 0) goes wrong.
"""

import errno
import fcntl
import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Action = Literal["count", "enospc", "eio", "kill", "slow"]

_CALLS = ("mkdir", "link", "rename", "replace", "unlink", "rmdir", "fsync", "open")
_NEED_SPACE = {"mkdir", "link", "open", "write", "flush", "fsync"}


class _File:
    """A file opened for writing whose writes and flushes are counted."""

    def __init__(self, file: Any, disk: "Disk") -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        def torn() -> None:
            self._file.write(memoryview(bytes(data))[: len(data) // 2])
            self._file.flush()

        self._disk.step("write", self._file.name, torn=torn)
        return self._file.write(data)

    def flush(self) -> None:
        self._disk.step("flush", self._file.name)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Disk:
    """Patches the ways to write below `root` while it is entered.

    Args:
        root: calls elsewhere are let through, uncounted.
        action: "enospc" fails the n-th call that needs space and all later ones, "eio" the n-th call only;
            both tear a write in half first. "kill" ends the process by SIGKILL instead. "slow" sleeps a
            random while at every call. "count" only counts.
        at: n.

    Attributes:
        log: names of the calls so far, and the paths that they were about.
    """

    def __init__(self, root: Path, action: Action = "count", at: int = -1) -> None:
        self.root, self.action, self.at = str(root), action, at
        self.log: list[tuple[str, ...]] = []
        self._random = random.Random(at)
        self._lock = threading.Lock()
        self._real: dict[str, Callable[..., Any]] = {}

    def step(self, name: str, *paths: str, torn: Callable[[], None] | None = None) -> None:
        """One call; raises, kills or waits when it is its turn."""
        with self._lock:
            number = len(self.log)
            self.log.append((name, *paths))
        if self.action == "slow":
            time.sleep(self._random.expovariate(200))
        full = self.action == "enospc" and number >= self.at and name in _NEED_SPACE
        if not (full or (self.action in ("eio", "kill") and number == self.at)):
            return
        if torn and number == self.at:
            torn()
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, os.strerror(code))

    def __enter__(self) -> Self:
        self._real = {name: getattr(os, name) for name in _CALLS}
        for name, real in self._real.items():
            setattr(os, name, self._counted(name, real))
        self._real["io.open"] = io.open
        io.open = self._open(io.open)  # type: ignore[assignment]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        io.open = self._real.pop("io.open")  # type: ignore[assignment]
        for name, real in self._real.items():
            setattr(os, name, real)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            paths = self._paths(name, args)
            if paths and paths[0].startswith(self.root):
                self.step(name, *paths)
            return real(*args, **options)

        return call

    def _paths(self, name: str, args: tuple[Any, ...]) -> list[str]:
        if name == "open" and not args[1] & (os.O_CREAT | os.O_WRONLY):
            return []
        if name in ("link", "rename", "replace"):
            return [os.fspath(args[0]), os.fspath(args[1])]
        return [_path_of(args[0]) if isinstance(args[0], int) else os.fspath(args[0])]

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            writes = isinstance(mode, str) and set(mode) & set("wxa+")
            if isinstance(file, int) or not writes or not os.fspath(file).startswith(self.root):
                return real(file, mode, *args, **options)
            self.step("open", os.fspath(file))
            return _File(real(file, mode, *args, **options), self)

        return call


def _path_of(handle: int) -> str:
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        return fcntl.fcntl(handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
    return str(Path(f"/proc/self/fd/{handle}").readlink())

"""The folder of a run: what lies in it, who may write to it, whether its run is finished. Costs nothing.

config.yaml       the settings as resolved
metrics.jsonl     one object for every iteration that was reported or evaluated
checkpoints/      states to go on from, see `checkpoints`
result.json       what the command printed; there when the run is finished
hashes.json       of what the run has written, see `finished`
"""

import contextlib
import fcntl
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config import load_config, save_config
from pipeline.settings import TrainSettings
from pipeline.training.finished import CHECKPOINTS, CONFIG, METRICS, RESULT, finish, read_result
from schemas.errors import UsageError

__all__ = ["CHECKPOINTS", "CONFIG", "METRICS", "RESULT", "RunFolder"]


@dataclass(slots=True, eq=False)
class RunFolder:
    """A run's folder, held by this process while the context lasts.

    Attributes:
        path: the folder.
        resumed: whether a run was in it already.
    """

    path: Path
    resumed: bool
    _lock: int

    @staticmethod
    def open(settings: TrainSettings) -> "RunFolder":
        """Takes the folder that the settings name; makes it if it is missing.

        Raises:
            UsageError: in use, or `resume` and something else than a run in it.
        """
        path = settings.out
        used = path.exists() and (not path.is_dir() or any(path.iterdir()))
        if used and not (settings.resume and (path / CONFIG).is_file()):
            raise UsageError(_in_use(path, resume=settings.resume))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{path}: cannot be made ({error.strerror}); choose another --out") from error
        return RunFolder(path, resumed=used, _lock=_locked(path))

    @staticmethod
    def of_peer(settings: TrainSettings, *, resumed: bool) -> "RunFolder":
        """The folder that another process of this run has taken.

        Raises:
            UsageError: it is not seen from here.
        """
        path = settings.out
        if not path.is_dir():
            raise UsageError(f"{path}: must be seen by all processes of a run, found none; share its disk")
        return RunFolder(path, resumed=resumed, _lock=os.open(path, os.O_RDONLY))

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / METRICS

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def result(self) -> dict[str, Any] | None:
        """What the finished run printed; None if it is not finished.

        Raises:
            CorruptionError: a file of the run is not what it wrote.
        """
        return read_result(self.path)

    def settings(self) -> TrainSettings:
        """The settings in `config.yaml`."""
        return TrainSettings(**load_config(self.path / CONFIG, TrainSettings))

    def save_settings(self, settings: TrainSettings) -> None:
        """Writes `config.yaml`, as of a run that begins, or of a finished one that is made longer."""
        (self.path / RESULT).unlink(missing_ok=True)
        save_config(replace(settings, resume=False), self.path / CONFIG)

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished."""
        finish(self.path, result)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)
        if error is not None and not self.resumed:
            with contextlib.suppress(OSError):
                self.path.rmdir()  # if nothing has been written yet


def _locked(path: Path) -> int:
    """A lock on the folder itself, which the kernel gives up with the process."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(
            f"{path}: one process at a time may train in it, found another; wait, or choose another --out"
        ) from None
    return handle


def _in_use(path: Path, *, resume: bool) -> str:
    if resume:
        return f"{path}: must hold a run to go on with, found no {CONFIG}; name the run's folder with --out"
    advice = (
        "choose another --out, or give --resume to go on"
        if (path / CONFIG).is_file()
        else "choose another --out"
    )
    return f"{path}: the folder of a run must be new or empty, found it in use; {advice}"

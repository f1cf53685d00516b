"""Where the figures of a run go: `metrics.jsonl`, one object an iteration, and services if asked for."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.config import to_plain
from pipeline.settings import TrainSettings
from schemas.errors import CheckpointError


class Metrics:
    """The file, and the services.

    Args:
        path: the file.
        after: the iteration that the run goes on from; later lines, of a run that was cut off, are dropped.
        callback: of mlx-lm, or None.
    """

    def __init__(self, path: Path, *, after: int, callback: Any = None) -> None:
        from pmetal_distill.offline.commit import failing_writes

        self._callback = callback
        self._writing = lambda: failing_writes(path.name, error=CheckpointError)
        with self._writing():
            if after:
                _cut(path, after)
            self._file = path.open("a" if after else "w", encoding="utf-8")

    def write(self, iteration: int, report: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        """Adds the line of an iteration; `report` and `evaluation` may be empty, but not both.

        Raises:
            CheckpointError: the disk is full or fails.
        """
        with self._writing():
            print(json.dumps({"iteration": iteration, **report, **evaluation}), file=self._file, flush=True)
        if self._callback is not None and report:
            self._callback.on_train_loss_report({"iteration": iteration, **report})
        if self._callback is not None and evaluation:
            self._callback.on_val_loss_report({"iteration": iteration, **evaluation})

    def flush(self) -> None:
        """Forces the lines to the medium, before the checkpoint that counts on them.

        Raises:
            CheckpointError: the disk fails.
        """
        with self._writing():
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class NoMetrics(Metrics):
    """For processes whose figures another one writes."""

    def __init__(self) -> None:
        pass

    def write(self, iteration: int, report: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Does nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def begin_services(settings: TrainSettings) -> Any:
    """mlx-lm's callback for the services that are asked for; None without any.

    Raises:
        UsageError: a package is missing.
    """
    from pmetal_distill.modelling.callbacks import reporting_callback

    if not settings.services:
        return None
    return reporting_callback(
        settings.services, project_name=settings.project_name, folder=settings.out, config=to_plain(settings)
    )


def _cut(path: Path, after: int) -> None:
    """Keeps the lines up to an iteration; one that was cut off in the middle goes, too."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    kept = [line for line in text.splitlines(keepends=True) if _iteration(line) <= after]
    draft = path.with_name(f".{path.name}.part")
    draft.write_text("".join(kept), encoding="utf-8")
    draft.replace(path)


def _iteration(line: str) -> float:
    """Of a line; infinite if it is not one of ours."""
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")

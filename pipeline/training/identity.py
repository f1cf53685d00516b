"""What must be the same for a run to go on: the settings that decide its weights, the student, the data.

Where these come from may change: student and data are compared by hash. Costs a read of the student's files.
"""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import to_plain
from pipeline.settings import LrSchedule, TrainSettings
from schemas.errors import CheckpointError

if TYPE_CHECKING:
    from pipeline.training.source import Source
    from pmetal_distill.models import LoadedModel

# Settings that do not decide the weights: what is told, kept and written; what is compared by hash; and the
# precision, of which a checkpoint says what it was resolved to.
FREE = {
    *("out", "cache", "teacher", "data", "student", "trust_remote_code", "prefetch", "memory_limit_gb"),
    *("steps_per_report", "steps_per_eval", "save_every", "keep_checkpoints", "report_to", "project_name"),
    *("resume", "fuse", "precision"),
}


def deciding_settings(settings: TrainSettings) -> dict[str, Any]:
    """The settings that must not change in a run, as plain values."""
    names = {field.name for field in fields(settings)} - FREE
    if not _depends_on_length(settings):
        names.remove("iters")
    plain = to_plain(settings)
    return {name: plain[name] for name in sorted(names)}


def check_same_settings(saved: dict[str, Any], settings: TrainSettings) -> None:
    """Refuses to go on with other settings.

    Raises:
        CheckpointError: names the key and both values.
    """
    given = deciding_settings(settings)
    # A run of an earlier version does not name settings that did not exist: it had their defaults.
    began = {**{name: value for name, value in _defaults().items() if name in given}, **saved}
    for name in sorted(began.keys() | given.keys()):
        if began.get(name) != given.get(name):
            raise CheckpointError(
                f"{name}: must be {began.get(name)!r}, as when this run began, found {given.get(name)!r}; "
                "give the value of the run, or begin a new one with another --out"
            )


def content_of(
    settings: TrainSettings, student: "LoadedModel", source: "Source"
) -> dict[str, dict[str, str]]:
    """Names and hashes of what the run is made from."""
    from pmetal_distill.models import model_fingerprint

    data = f"{settings.teacher} on {settings.data}" if settings.cache is None else str(settings.cache)
    return {
        "student": {"name": settings.student, "sha256": model_fingerprint(student)},
        "cache" if settings.cache is not None else "teacher, data": {"name": data, "sha256": source.root},
    }


def check_same_content(saved: dict[str, dict[str, str]], given: dict[str, dict[str, str]]) -> None:
    """Refuses to go on with another student or other data.

    Raises:
        CheckpointError: names the key and both values.
    """
    for key in [*saved, *given]:
        was, now = (
            f"{of[key]['name']} ({of[key]['sha256'][:16]})" if key in of else "nothing"
            for of in (saved, given)
        )
        if key not in saved or key not in given or saved[key]["sha256"] != given[key]["sha256"]:
            raise CheckpointError(
                f"{key}: must have the content with which this run began, {was}, found {now}; give that one, "
                "or begin a new run with another --out"
            )


def _defaults() -> dict[str, Any]:
    """Plain values of the settings that have a default."""
    plain = to_plain(TrainSettings(student="", out=Path(), cache=""))
    return {f.name: plain[f.name] for f in fields(TrainSettings) if f.name not in ("student", "out", "cache")}


def _depends_on_length(settings: TrainSettings) -> bool:
    """Whether the learning rates of a run follow from its number of iterations."""
    if isinstance(settings.lr_schedule, LrSchedule):
        return False
    return settings.lr_schedule != "constant" or settings.warmup is None

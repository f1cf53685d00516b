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
    if not depends_on_length(settings):
        names.remove("iters")
    plain = to_plain(settings)
    return {name: plain[name] for name in sorted(names)}


def check_same_settings(saved: dict[str, Any], settings: TrainSettings, *, finished: bool = False) -> None:
    """Refuses to go on with other settings.

    Args:
        saved: those that the run began with.
        settings: those wanted.
        finished: whether the run came to its end, and may be made longer.

    Raises:
        CheckpointError: names the option and both values.
    """
    given = deciding_settings(settings)
    # A run of an earlier version does not name settings that did not exist: it had their defaults.
    began = {**{name: value for name, value in _defaults().items() if name in given}, **saved}
    for name in sorted(began.keys() | given.keys()):
        longer = finished and name == "iters" and settings.iters > began.get(name, 0)
        if began.get(name) != given.get(name) and not longer:
            raise CheckpointError(
                f"{option_of(name)}: must be {began.get(name)!r}, as when this run began, found "
                f"{given.get(name)!r}; give the value of the run, or begin a new one with another --out"
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
        CheckpointError: names the option and both values.
    """
    for key in [*saved, *given]:
        was, now = saved.get(key), given.get(key)
        if was is not None and now is not None and was["sha256"] == now["sha256"]:
            continue
        options = ", ".join(option_of(name) for name in key.split(", "))
        found = "nothing" if now is None else now["name"]
        if was is not None and now is not None and was["name"] == now["name"]:
            found = f"other content there (SHA-256 {now['sha256'][:16]}, then {was['sha256'][:16]})"
        raise CheckpointError(
            f"{options}: must be what this run began with, {was['name'] if was else 'nothing'}, found "
            f"{found}; give that, or begin a new run with another --out"
        )


def option_of(name: str) -> str:
    """How a setting is given: its option, or its key if it stands in files only."""
    metadata = {field.name: field.metadata for field in fields(TrainSettings)}[name]
    return f"--{name.replace('_', '-')}" if "help" in metadata else f"'{name}' in the file"


def _defaults() -> dict[str, Any]:
    """Plain values of the settings that have a default."""
    plain = to_plain(TrainSettings(student="", out=Path(), cache=""))
    return {f.name: plain[f.name] for f in fields(TrainSettings) if f.name not in ("student", "out", "cache")}


def depends_on_length(settings: TrainSettings) -> bool:
    """Whether the learning rates of a run follow from its number of iterations."""
    if isinstance(settings.lr_schedule, LrSchedule):
        return False
    return settings.lr_schedule != "constant" or settings.warmup is None

"""How far a cache or a run has come, while it is being made or after. Costs a listing of small files."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pipeline.config import load_config
from pipeline.console import aligned
from pipeline.settings import TrainSettings
from pipeline.training.finished import CONFIG, METRICS, SMALL, check_run, last_report
from pmetal_distill.offline.commit import DATASET
from schemas.errors import UsageError

_ITERS = next(field.default for field in fields(TrainSettings) if field.name == "iters")
SHOWN = ("loss", "soft", "hard", "hidden", "learning_rate", "temperature", "tokens_per_second")


def status(folder: Path) -> dict[str, Any]:
    """Progress of a cache or a run, whichever the folder is.

    Raises:
        UsageError: it is neither.
        DataError, CorruptionError: a run's files are damaged, or not what it wrote.
    """
    if (folder / DATASET).exists():
        return _cache(folder)
    if (folder / CONFIG).exists():
        return _run(folder)
    raise UsageError(
        f"{folder}: must be a cache or a run, found neither {DATASET} nor {CONFIG}; check the path"
    )


def status_text(facts: dict[str, Any]) -> str:
    """The same for people."""
    if facts["kind"] == "run":
        rows = [("iterations", f"{facts['iteration']:,} of {facts['iters']:,}")]
        rows += [(name, f"{facts[name]:.6g}") for name in SHOWN if name in facts]
        return aligned([*rows, ("time left", duration(facts["seconds_left"]))])
    rate = facts["tokens_per_second"]
    return aligned(
        [
            ("shards", f"{facts['shards']:,} of {facts['num_shards']:,}"),
            ("tokens", f"{facts['tokens']:,} of {facts['num_tokens']:,}"),
            ("writers here", str(facts["writers"])),
            ("tokens a second", "unknown" if rate is None else f"{rate:,.0f}"),
            ("time left", duration(facts["seconds_left"])),
            (
                "last commit",
                "none" if facts["idle_seconds"] is None else f"{duration(facts['idle_seconds'])} ago",
            ),
        ]
    )


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 1:02:03."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _cache(folder: Path) -> dict[str, Any]:
    from pmetal_distill.offline.progress import cache_progress

    progress = cache_progress(folder)
    return {"kind": "cache", **asdict(progress), "complete": progress.complete}


def _run(folder: Path) -> dict[str, Any]:
    check_run(folder, SMALL)
    iters = int(load_config(folder / CONFIG, TrainSettings).get("iters", _ITERS))
    last = last_report(folder / METRICS)
    done = int(last.get("iteration", 0))
    per_step = last["seconds"] / done if done else None
    return {
        "kind": "run",
        **last,
        "iteration": done,
        "iters": iters,
        "complete": done >= iters,
        "seconds_left": None if per_step is None else per_step * (iters - done),
    }

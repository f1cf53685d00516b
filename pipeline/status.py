"""How far a cache or a run has come, while it is being made or after. Costs a listing of small files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import load_config
from pipeline.console import aligned
from pipeline.settings import TrainSettings
from pipeline.training.folder import CONFIG, METRICS
from pmetal_distill.offline.commit import DATASET
from schemas.errors import UsageError

SHOWN = ("loss", "soft", "hard", "hidden", "learning_rate", "temperature", "tokens_per_second")


def status(folder: Path) -> dict[str, Any]:
    """Progress of a cache or a run, whichever the folder is.

    Raises:
        UsageError: it is neither.
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
    iters = int(load_config(folder / CONFIG, TrainSettings)["iters"])
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


def last_report(path: Path) -> dict[str, Any]:
    """The last whole training report of a metrics file; empty if there is none.

    A line that is being written is not there yet.
    """
    if not path.exists():
        return {}
    for line in reversed(path.read_bytes().splitlines()):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and "loss" in report:
            return report
    return {}

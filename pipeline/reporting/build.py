"""`report`: from a folder to an HTML file. Costs a look at some dozen row groups, for runs a forward pass."""

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.about import version_line
from pipeline.console import Console
from pipeline.reporting.cache_report import cache_report
from pipeline.reporting.images import write_figures
from pipeline.reporting.page import GENERATOR, Report
from pipeline.reporting.places import is_remote, shown
from pipeline.reporting.plan_figures import plan_rows
from pipeline.reporting.run_files import read_object
from pipeline.reporting.run_report import RunInputs, run_report
from pipeline.training.folder import CONFIG, METRICS
from schemas.errors import UsageError

_MARK = f'name="generator" content="{GENERATOR}"'


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What to draw and where to.

    Attributes:
        source: folder of a cache or a run, or the URL of a cache.
        out: the HTML file.
        plan: what `plan --json` printed, for a cache.
        evaluation: what `eval --json` printed, for a run.
        figures: a folder for the figures as files of their own.
    """

    source: str
    out: Path
    plan: Path | None = None
    evaluation: Path | None = None
    figures: Path | None = None


def build_report(options: ReportOptions, console: Console) -> dict[str, Any]:
    """Writes the report.

    Returns:
        `kind`, `report` and its `bytes`, the `figures` written, and what was `skipped` and why.

    Raises:
        UsageError: neither a cache nor a run, an option for the other kind, or `out` is another file.
        CacheError, DataError: damaged files.
    """
    kind = kind_of(options.source)
    _check_options(options, kind)
    _check_out(options.out)
    console.note(f"reading the {kind} {shown(options.source)}")
    report = _report(options, kind)
    text = report.html()
    _write(options.out, text)
    skipped = dict(report.skipped)
    figures: list[str] = []
    if options.figures is not None:
        figures, reason = write_figures(report.figures, options.figures, console)
        skipped |= {"png": reason} if reason else {}
    return {
        "kind": kind,
        "report": str(options.out),
        "bytes": len(text.encode()),
        "figures": [str(options.figures / name) for name in figures] if options.figures else [],
        "skipped": skipped,
    }


def report_text(result: dict[str, Any]) -> str:
    """`build_report` for people."""
    lines = [f"{result['report']}: report of a {result['kind']}, {result['bytes'] / 1000:.0f} kB"]
    if result["figures"]:
        lines.append(f"{len(result['figures'])} figures in {Path(result['figures'][0]).parent}")
    lines += [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def kind_of(source: str) -> str:
    """ "cache" or "run".

    Raises:
        UsageError: neither.
    """
    folder = Path(source)
    if is_remote(source) or (folder / "dataset.json").is_file():
        return "cache"
    if (folder / METRICS).is_file() or (folder / CONFIG).is_file():
        return "run"
    inside = [f"'{folder / name}'" for name in ("run", "cache") if (folder / name).is_dir()]
    advice = f"give {' or '.join(inside)}" if inside else "give the folder itself"
    raise UsageError(
        f"{folder}: must be a cache (dataset.json) or a run ({METRICS}), found neither; {advice}"
    )


def _report(options: ReportOptions, kind: str) -> Report:
    footer = f"{version_line()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. This page loads nothing."
    if kind == "run":
        path = options.evaluation
        found = read_object(path, printed_by="eval --json") if path else None
        return run_report(RunInputs(Path(options.source), found), footer=footer)
    rows = []
    if options.plan is not None:
        plan = read_object(options.plan, printed_by="plan --json")
        rows = plan_rows(plan, where=str(options.plan))
    return cache_report(options.source, plan=rows, footer=footer)


def _check_options(options: ReportOptions, kind: str) -> None:
    if kind == "run" and options.plan is not None:
        raise UsageError(f"--plan: goes with a cache, found the run {options.source}; leave it out")
    if kind == "cache" and options.evaluation is not None:
        raise UsageError(f"--eval: goes with a run, found the cache {shown(options.source)}; leave it out")


def _check_out(out: Path) -> None:
    """Only an earlier report is replaced."""
    if out.is_dir():
        raise UsageError(f"{out}: must be a file, found a folder; give --out {out / 'report.html'}")
    if out.exists() and _MARK not in out.read_text(encoding="utf-8", errors="replace")[:4000]:
        raise UsageError(f"{out}: must be new or an earlier report, found another file; choose another --out")


def _write(out: Path, text: str) -> None:
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    finally:
        draft.unlink(missing_ok=True)

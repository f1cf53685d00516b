"""`verify` and `repair` for the command line. Costs a read of every byte."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.console import Console, aligned


def verify(cache: Path, console: Console) -> dict[str, Any]:
    """Checks a cache; `ok`, counts, and one message a finding."""
    from pmetal_distill.offline.verify import verify_cache

    with _shards(console, "verifying", cache) as advance:
        report = verify_cache(cache, progress=advance)
    return {
        "ok": report.ok,
        "shards": report.shards,
        "sequences": report.sequences,
        "tokens": report.tokens,
        "bytes": report.num_bytes,
        "damaged_shards": report.damaged_shards(),
        "findings": [
            {"kind": finding.kind, "path": finding.path, "message": str(finding)}
            for finding in report.findings
        ],
    }


def findings_text(report: dict[str, Any]) -> str:
    """`verify` for people."""
    counts = aligned((name, report[name]) for name in ("shards", "sequences", "tokens", "bytes"))
    found = [f"{finding['kind']}: {finding['message']}" for finding in report["findings"]]
    verdict = "sound: every hash, page checksum and invariant holds" if report["ok"] else "not sound"
    if report["damaged_shards"]:
        verdict += "; run 'pmetal-pipeline repair', then 'pmetal-pipeline cache --resume'"
    return "\n".join([counts, *found, verdict])


def repair(cache: Path, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Sets damaged shards aside; which ones, and which files moved."""
    from pmetal_distill.offline.repair import repair_cache

    with _shards(console, "verifying", cache) as advance:
        report = repair_cache(cache, dry_run=dry_run, progress=advance)
    return {
        "dry_run": dry_run,
        "shards": report.shards,
        "moved": report.moved,
        "mended": report.mended,
        "left": [str(finding) for finding in report.left],
    }


def repair_text(report: dict[str, Any]) -> str:
    """`repair` for people."""
    verb = "would move" if report["dry_run"] else "moved"
    lines = [f"{verb} to quarantine: {name}" for name in report["moved"]]
    lines += [f"{'would mend' if report['dry_run'] else 'mended'}: {name}" for name in report["mended"]]
    lines += [f"cannot be repaired: {message}" for message in report["left"]]
    if report["shards"]:
        lines.append(f"shards to write again: {report['shards']}; run 'pmetal-pipeline cache --resume'")
    return "\n".join(lines) or "nothing to repair"


@contextmanager
def _shards(console: Console, label: str, cache: Path) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as a function of (shards done, shards in total); counts records of any condition."""
    total = sum(1 for _ in (cache / "commits").glob("[0-9]*.json"))
    with console.progress(label, total=total, unit="shards") as progress:
        yield lambda done, total: progress.advance(1)

"""Take damaged shards out of a cache, so that resuming writes exactly those again. Deletes nothing.

Killed at any point, it leaves a cache in which each shard is whole or missing: the commit record goes first.
It keeps writers out while it works, so that it cannot take away what they have just written.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pmetal_distill.offline.commit import failing_writes, flush_folder
from pmetal_distill.offline.mending import QUARANTINE, alone, mend_dataset, new_quarantine, replace_file
from pmetal_distill.offline.store import DATASET, SHARD_FILE, SPARE, Store
from pmetal_distill.offline.verify import Finding, verify_cache

__all__ = ["QUARANTINE", "RepairReport", "repair_cache"]


@dataclass(slots=True)
class RepairReport:
    """What was done.

    Attributes:
        shards: to be written again: `CacheWriter.missing_shards()` now lists them, too.
        moved: files that went to the quarantine, relative to the cache.
        mended: files that are right again without being written anew.
        left: findings that repair cannot act on.
    """

    shards: list[int] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)


def repair_cache(
    path: Path | str,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RepairReport:
    """Verify a cache and quarantine what is damaged, with every commit record that depends on it.

    A damaged or missing `dataset.json` comes back from its spare copy; without one, a single wrong byte in it
    is put right from what the commit records say of it.

    Args:
        path: the folder.
        dry_run: only say what would be moved.
        progress: as in `verify_cache`.

    Raises:
        UsageError: not a cache.
        CorruptionError, VersionError: `dataset.json` is beyond that; restore it from a copy.
        CacheError: the folder cannot be written, or somebody writes the cache at this moment.
    """
    root = Path(path)
    if dry_run:
        first = mend_dataset(root, dry_run=True)
        return RepairReport(moved=first) if first else _repair(root, dry_run=True, progress=progress)
    was_there = (root / DATASET).exists()
    with alone(root):
        first = mend_dataset(root)
    if first and not (root / DATASET).exists():
        return RepairReport(moved=first)
    with alone(root):
        report = _repair(root, dry_run=False, progress=progress)
    report.moved = [*first, *report.moved]
    if first or not was_there:
        report.mended.insert(0, DATASET)
    return report


def _repair(root: Path, *, dry_run: bool, progress: Callable[[int, int], None] | None) -> RepairReport:
    found = verify_cache(root, progress=progress)
    store = Store.open(root)
    shards = found.damaged_shards()
    report = RepairReport(shards=shards, left=[f for f in found.findings if _is_left(f)])
    report.moved = [name for shard in shards for name in _files_of(store, shard)]
    report.moved += sorted(
        {f.path for f in found.findings if _is_movable(f, store) and f.path not in report.moved}
    )
    if any(f.kind == "damage" and f.path == SPARE for f in found.findings):
        report.mended.append(SPARE)
    if not dry_run:
        with failing_writes(f"{store.root.name}/{QUARANTINE}"):
            _move(store.root, report.moved)
            if report.mended:
                _renew_spare(store.root)
    return report


def _renew_spare(root: Path) -> None:
    scratch = new_quarantine(root)
    if (root / SPARE).exists() or (root / SPARE).is_symlink():
        (root / SPARE).rename(scratch / SPARE)
    replace_file(root / SPARE, (root / DATASET).read_bytes(), scratch)


def _is_left(finding: Finding) -> bool:
    return finding.kind == "damage" and finding.path == DATASET


def _is_movable(finding: Finding, store: Store) -> bool:
    """Sidecars and tokenizer files that are damaged, and orphans of shards that are committed."""
    if finding.kind == "damage":
        path = store.root / finding.path
        return finding.path.startswith(("bases/", "tokenizer/")) and (path.exists() or path.is_symlink())
    name = SHARD_FILE.fullmatch(Path(finding.path).name)
    return finding.kind == "orphan" and name is not None and store.record_path(int(name.group(1))).exists()


def _files_of(store: Store, shard: int) -> list[str]:
    """The record of a shard, which must go first, and its files, whatever their hashes."""
    folder = store.root / "shards"
    names = [p.name for p in folder.iterdir()] if folder.exists() else []
    matches = ((name, SHARD_FILE.fullmatch(name)) for name in sorted(names))
    return [
        f"commits/{shard:05d}.json",
        *(f"shards/{name}" for name, match in matches if match and int(match.group(1)) == shard),
    ]


def _move(root: Path, names: list[str]) -> None:
    if not names:
        return
    target = new_quarantine(root)
    for name in names:
        source = root / name
        if source.exists() or source.is_symlink():
            source.rename(target / name.replace("/", "-"))
            flush_folder(source.parent)
    flush_folder(target)

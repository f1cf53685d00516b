"""Take damaged shards out of a cache, so that resuming writes exactly those again. Deletes nothing.

Killed at any point, it leaves a cache in which each shard is whole or missing: the commit record goes first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pmetal_distill.offline.commit import failing_writes, flush_folder
from pmetal_distill.offline.store import SHARD_FILE, Store
from pmetal_distill.offline.verify import Finding, verify_cache

QUARANTINE = "quarantine"


@dataclass(slots=True)
class RepairReport:
    """What was done.

    Attributes:
        shards: to be written again: `CacheWriter.missing_shards()` now lists them, too.
        moved: files that went to the quarantine, relative to the cache.
        left: findings that repair cannot act on.
    """

    shards: list[int] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)


def repair_cache(
    path: Path | str,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> RepairReport:
    """Verify a cache and quarantine what is damaged, with every commit record that depends on it.

    Args:
        path: the folder.
        dry_run: only say what would be moved.
        progress: as in `verify_cache`.

    Raises:
        UsageError: not a cache.
        CorruptionError, VersionError: `dataset.json` itself cannot be used; restore it from a copy.
        CacheError: the folder cannot be written.
    """
    found = verify_cache(path, progress=progress)
    store = Store.open(Path(path))
    shards = found.damaged_shards()
    report = RepairReport(shards=shards, left=[f for f in found.findings if _is_left(f)])
    report.moved = [name for shard in shards for name in _files_of(store, shard)]
    report.moved += sorted(
        {f.path for f in found.findings if _is_movable(f, store) and f.path not in report.moved}
    )
    if not dry_run:
        with failing_writes(f"{store.root.name}/{QUARANTINE}"):
            _move(store.root, report.moved)
    return report


def _is_left(finding: Finding) -> bool:
    return finding.kind == "damage" and finding.path == "dataset.json"


def _is_movable(finding: Finding, store: Store) -> bool:
    """Sidecars and tokenizer files that are damaged, and orphans of shards that are committed."""
    if finding.kind == "damage":
        return finding.path.startswith(("bases/", "tokenizer/")) and (store.root / finding.path).exists()
    name = SHARD_FILE.fullmatch(Path(finding.path).name)
    return finding.kind == "orphan" and name is not None and store.record_path(int(name.group(1))).exists()


def _files_of(store: Store, shard: int) -> list[str]:
    """The record of a shard, which must go first, and its files, whatever their hashes."""
    names = [p.name for p in (store.root / "shards").iterdir()]
    matches = ((name, SHARD_FILE.fullmatch(name)) for name in sorted(names))
    return [
        f"commits/{shard:05d}.json",
        *(f"shards/{name}" for name, match in matches if match and int(match.group(1)) == shard),
    ]


def _move(root: Path, names: list[str]) -> None:
    if not names:
        return
    (root / QUARANTINE).mkdir(exist_ok=True)
    target = _fresh_folder(root / QUARANTINE)
    for name in names:
        source = root / name
        if source.exists() or source.is_symlink():
            source.rename(target / name.replace("/", "-"))
            flush_folder(source.parent)
    flush_folder(target)


def _fresh_folder(parent: Path) -> Path:
    number = 0
    while True:
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder

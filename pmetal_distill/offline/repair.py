"""Take damaged shards out of a cache, so that resuming writes exactly those again. Deletes nothing.

Killed at any point, it leaves a cache in which each shard is whole or missing: the commit record goes first.
It keeps writers out while it works, so that it cannot take away what they have just written.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pmetal_distill.offline.commit import (
    check_folder,
    failing_writes,
    flush_file,
    flush_folder,
    guard,
    move,
    read_plain,
    release,
)
from pmetal_distill.offline.mending import mended, recorded_checksum
from pmetal_distill.offline.store import DATASET, SHARD_FILE, Store
from pmetal_distill.offline.verify import Finding, verify_cache
from schemas.errors import CorruptionError, VersionError
from schemas.manifest import MAX_DATASET_BYTES

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

    A `dataset.json` with one wrong byte is put right from what the commit records say of it.

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
        first = _repair_dataset(root, dry_run=True)
        return RepairReport(moved=first) if first else _repair(root, dry_run=True, progress=progress)
    with _alone(root):
        first = _repair_dataset(root, dry_run=False)
    if first and not (root / DATASET).exists():
        return RepairReport(moved=first)
    with _alone(root):
        report = _repair(root, dry_run=False, progress=progress)
    report.moved = [*first, *report.moved]
    return report


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    handle = guard(root, exclusive=True)
    try:
        yield
    finally:
        release(handle)


def _repair_dataset(root: Path, *, dry_run: bool) -> list[str]:
    """Puts a damaged `dataset.json` right, or aside where no record needs it; what went to quarantine."""
    try:
        Store.open(root)
    except (CorruptionError, VersionError) as error:
        data = read_plain(root / DATASET, max_bytes=MAX_DATASET_BYTES)
        check_folder(root / "commits")
        checksum = recorded_checksum(root / "commits")
        whole = mended(data, checksum) if checksum else None
        if whole == data:
            raise
        if checksum and whole is None:
            advice = "restore it from a copy, or move it away and run 'cache --resume' with the same options"
            raise type(error)(f"{error}; {advice}") from error
        if not dry_run:
            with failing_writes(f"{root.name}/{DATASET}"):
                if whole is None:
                    _move(root, [DATASET])
                else:
                    _replace(root / DATASET, whole, _new_quarantine(root))
        return [DATASET]
    return []


def _replace(path: Path, data: bytes, quarantine: Path) -> None:
    """Puts `data` in the place of a file, whole or not at all, and keeps a copy of what was there."""
    shutil.copyfile(path, quarantine / path.name)
    draft = quarantine / f"new-{path.name}"
    with draft.open("xb") as handle:
        handle.write(data)
        flush_file(handle)
    move(draft, path)


def _repair(root: Path, *, dry_run: bool, progress: Callable[[int, int], None] | None) -> RepairReport:
    found = verify_cache(root, progress=progress)
    store = Store.open(root)
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
    target = _new_quarantine(root)
    for name in names:
        source = root / name
        if source.exists() or source.is_symlink():
            source.rename(target / name.replace("/", "-"))
            flush_folder(source.parent)
    flush_folder(target)


def _new_quarantine(root: Path) -> Path:
    with suppress(FileExistsError):
        (root / QUARANTINE).mkdir()
    check_folder(root / QUARANTINE)
    return _fresh_folder(root / QUARANTINE)


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

"""A damaged `dataset.json` from its spare copy, or from what the commit records say of it.

Every record carries the checksum of the dataset it belongs to: a copy can be judged by it, and one wrong byte
found by trial. The trial costs 256 hashes a byte, a few seconds in all; the rest a few small files.
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pmetal_distill.offline.commit import (
    DATASET,
    check_folder,
    failing_writes,
    flush_file,
    flush_folder,
    guard,
    move,
    read_plain,
    release,
)
from pmetal_distill.offline.store import SPARE, Store
from schemas.errors import CacheError, CorruptionError, VersionError
from schemas.manifest import MAX_DATASET_BYTES, MAX_RECORD_BYTES, Dataset, checksum_of, unseal

QUARANTINE = "quarantine"
MAX_MENDED_BYTES = 1 << 14
_KEY = b'"checksum": "'
_DIGITS = 64


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Keeps writers and other repairs out.

    Raises:
        CacheError: one of them is at work.
    """
    handle = guard(root, exclusive=True)
    try:
        yield
    finally:
        release(handle)


def mend_dataset(root: Path, *, dry_run: bool = False, guesses: Sequence[bytes] = ()) -> list[str]:
    """Puts a damaged `dataset.json` right, or aside where no record needs it. The caller is `alone`.

    Args:
        root: of the cache.
        dry_run: only say whether it would be done.
        guesses: what else it may have been; believed if the records name it.

    Returns:
        DATASET if it went to quarantine, else nothing.

    Raises:
        CorruptionError, VersionError: damaged beyond what is known of it.
    """
    if not (root / DATASET).exists() and not (root / DATASET).is_symlink():
        return _bring_back(root, dry_run=dry_run)
    try:
        Store.open(root)
    except (CorruptionError, VersionError) as error:
        data = read_plain(root / DATASET, max_bytes=MAX_DATASET_BYTES)
        check_folder(root / "commits")
        checksum = recorded_checksum(root / "commits")
        whole = _known(root, checksum, guesses)
        if whole is None and checksum:
            whole = mended(data, checksum)
        if whole == data:
            raise
        if checksum and whole is None:
            advice = "restore it from a copy, or move it away and run 'cache --resume' with the same options"
            raise type(error)(f"{error}; {advice}") from error
        if not dry_run:
            with failing_writes(f"{root.name}/{DATASET}"):
                _set_aside(root, whole)
        return [DATASET]
    return []


def spare_dataset(root: Path) -> bytes | None:
    """The spare copy of `dataset.json`; None without a sound one."""
    try:
        data = read_plain(root / SPARE, max_bytes=MAX_DATASET_BYTES)
        Dataset.from_bytes(data, where=SPARE)
    except CacheError:
        return None
    return data


def replace_file(path: Path, data: bytes, scratch: Path) -> None:
    """Puts `data` in the place of a file, whole or not at all; `scratch` is a folder of the same disk."""
    draft = scratch / f"new-{path.name}"
    with draft.open("xb") as handle:
        handle.write(data)
        flush_file(handle)
    move(draft, path)


def new_quarantine(root: Path) -> Path:
    """A fresh folder for files that are taken out of service."""
    with suppress(FileExistsError):
        (root / QUARANTINE).mkdir()
    check_folder(root / QUARANTINE)
    number = 0
    while True:
        folder = root / QUARANTINE / f"{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _bring_back(root: Path, *, dry_run: bool) -> list[str]:
    """A `dataset.json` that is gone; nothing went to quarantine, as nothing was there."""
    if not dry_run and (whole := _known(root, recorded_checksum(root / "commits"), ())):
        with failing_writes(f"{root.name}/{DATASET}"):
            scratch = new_quarantine(root)
            replace_file(root / DATASET, whole, scratch)
            scratch.rmdir()
    return []


def _known(root: Path, checksum: str | None, guesses: Sequence[bytes]) -> bytes | None:
    """The spare copy, or a guess, that the records name; the copy alone without a record."""
    spare = spare_dataset(root)
    if checksum is None:
        return spare
    found = [spare, *guesses] if spare else list(guesses)
    return next((data for data in found if checksum_of(data) == checksum), None)


def _set_aside(root: Path, whole: bytes | None) -> None:
    quarantine = new_quarantine(root)
    if whole is None:
        (root / DATASET).rename(quarantine / DATASET)
        flush_folder(root)
        flush_folder(quarantine)
    else:
        shutil.copyfile(root / DATASET, quarantine / DATASET)
        replace_file(root / DATASET, whole, quarantine)


def recorded_checksum(commits: Path) -> str | None:
    """The checksum of the dataset that most sound records name; None without a sound record."""
    named = Counter(name for path in sorted(commits.glob("*.json")) if (name := _dataset_of(path)))
    return named.most_common(1)[0][0] if named else None


def mended(data: bytes, checksum: str) -> bytes | None:
    """`data` with at most one byte (or any checksum digits) changed so that it has this checksum, or None."""
    at = data.find(_KEY) + len(_KEY)
    if at >= len(_KEY) and checksum_of(fixed := _with_digits(data, at, checksum)) == checksum:
        return fixed
    if len(data) > MAX_MENDED_BYTES:
        return None
    for place in [at] if at >= len(_KEY) else _places(data):
        blank = _with_digits(data, place, "0" * _DIGITS)
        found = _one_byte(blank, checksum)
        if found is not None and checksum_of(whole := _with_digits(found, place, checksum)) == checksum:
            return whole
    return None


def dataset_of_record(data: bytes) -> str | None:
    """The checksum of the dataset that a commit record belongs to; None for anything but a sound record."""
    try:
        fields = unseal(data, where="record", max_bytes=MAX_RECORD_BYTES)
        return fields.text("dataset", pattern="[0-9a-f]{64}")
    except CacheError:
        return None


def _dataset_of(path: Path) -> str | None:
    try:
        return dataset_of_record(read_plain(path, max_bytes=MAX_RECORD_BYTES))
    except CacheError:
        return None


def _with_digits(data: bytes, at: int, digits: str) -> bytes:
    return data[:at] + digits.encode() + data[at + _DIGITS :]


def _places(data: bytes) -> list[int]:
    """Where the checksum's digits may begin when the key before them is damaged."""
    starts = range(len(data) - len(_KEY) - _DIGITS)
    return [
        at + len(_KEY)
        for at in starts
        if sum(a != b for a, b in zip(data[at : at + len(_KEY)], _KEY, strict=True)) == 1
    ]


def _one_byte(data: bytes, checksum: str) -> bytes | None:
    wanted = bytes.fromhex(checksum)
    before = hashlib.sha256()
    for at in range(len(data)):
        rest = data[at + 1 :]
        for value in range(256):
            digest = before.copy()
            digest.update(bytes((value,)) + rest)
            if digest.digest() == wanted:
                return data[:at] + bytes((value,)) + rest
        before.update(data[at : at + 1])
    return None

"""A damaged `dataset.json` from what the commit records say of it.

Every record carries the checksum of the dataset it belongs to, so one wrong byte can be found by trial. Costs
256 hashes a byte, a few seconds in all; used by `repair` only.
"""

import hashlib
from collections import Counter
from pathlib import Path

from pmetal_distill.offline.commit import read_plain
from schemas.errors import CacheError
from schemas.manifest import MAX_RECORD_BYTES, checksum_of, unseal

MAX_MENDED_BYTES = 1 << 14
_KEY = b'"checksum": "'
_DIGITS = 64


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

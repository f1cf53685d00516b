"""Files shared by many shards, named `<kind>-<first 16 hex digits of their SHA-256>.safetensors`."""

import hashlib
from pathlib import Path

from schemas.errors import CorruptionError

SUFFIX = ".safetensors"
MAX_SIDECAR_BYTES = 1 << 32


def content_name(kind: str, data: bytes) -> str:
    """The file's name without its suffix."""
    return f"{kind}-{hashlib.sha256(data).hexdigest()[:16]}"


def read_sidecar(path: Path, *, kind: str, sha256: str | None = None) -> bytes:
    """The bytes of a sidecar, checked against its name (and against the full hash when given).

    Raises:
        CorruptionError: missing, not a plain file, too large, or its bytes do not hash to its name.
    """
    try:
        size = path.stat().st_size if path.is_file() and not path.is_symlink() else -1
        data = path.read_bytes() if 0 <= size <= MAX_SIDECAR_BYTES else b""
    except OSError as error:
        raise CorruptionError(f"{path.name}: must be readable, found {error}") from error
    if size < 0:
        raise CorruptionError(f"{path.name}: must be a plain file, found none; copy it from its source again")
    digest = hashlib.sha256(data).hexdigest()
    if path.name != f"{kind}-{digest[:16]}{SUFFIX}" or sha256 not in (None, digest):
        raise CorruptionError(
            f"{path.name}: content must hash to its name, found {digest[:16]}; copy it again"
        )
    return data

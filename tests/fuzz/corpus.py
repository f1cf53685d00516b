"""Inputs that fuzzing has grown, tests/fuzz/corpus/TARGET.zip: few that reach all that was reached."""

import hashlib
import zipfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"


def read_corpus(target: str) -> dict[str, bytes]:
    """Inputs by name; none where there is no file."""
    path = FOLDER / f"{target}.zip"
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_corpus(target: str, inputs: Iterable[bytes]) -> None:
    """Names are hashes and dates the oldest, so that the same inputs make the same file."""
    FOLDER.mkdir(exist_ok=True)
    by_name = {hashlib.sha256(content).hexdigest()[:16]: content for content in inputs}
    with zipfile.ZipFile(FOLDER / f"{target}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(by_name.items()):
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)

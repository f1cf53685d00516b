"""A command line run in this process, and one small cache for all tests that only read it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main

SENTENCES = (
    "The quick brown fox jumps over the lazy dog and runs into the forest. ",
    "A teacher writes what it knows about every token, and a student reads it later. ",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # prints 3\n",
)


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs `pmetal-pipeline` with the given words."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 tokens in 24 documents, as JSONL."""
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    lines = [json.dumps({"text": SENTENCES[n % 3] * (1 + n % 4)}) for n in range(24)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def bucket_cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with tail `bucket`; do not change it."""
    from pipeline.cache import run_cache
    from pipeline.console import Console
    from pipeline.settings import CacheSettings

    out = tmp_path_factory.mktemp("cache") / "bucket"
    settings = CacheSettings(
        teacher=str(tiny_teacher),
        data=str(text_file),
        out=out,
        tail="bucket",
        max_seq_len=64,
        batch_size=4,
        sequences_per_shard=8,
        head_chunk=50,
    )
    run_cache(settings, Console(quiet=True))
    return out

"""One cache of short sequences for all runs of this folder; do not change it."""

from pathlib import Path

import pytest

from tests.pipeline.training.sources import make_cache


@pytest.fixture(scope="session")
def short_cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 130 sequences of 16 tokens, tail `bucket`."""
    return make_cache(tiny_teacher, text_file, tmp_path_factory.mktemp("cache") / "short")

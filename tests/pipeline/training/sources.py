"""Sources of runs over a small text, for the tests of this folder."""

from pathlib import Path
from typing import Any

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.training.source import Source, open_source
from pmetal_distill.models import load_model

QUIET = Console(quiet=True)
LENGTH = 16
VOCAB = 320


def make_cache(teacher: Path, data: Path, out: Path, **changes: Any) -> Path:
    """A cache with the default shard size, of short sequences, so that there are several shards."""
    values: dict[str, Any] = {"tail": "bucket", "max_seq_len": LENGTH, "top_k": 8} | changes
    run_cache(CacheSettings(teacher=str(teacher), data=str(data), out=out, **values), QUIET)
    return out


def offline(cache: Path, student: Path, **changes: Any) -> TrainSettings:
    """Settings of a run from a cache."""
    return TrainSettings(student=str(student), out=Path("unused"), cache=cache, **changes)


def online(teacher: Path, data: Path, student: Path, **changes: Any) -> TrainSettings:
    """Settings of a run beside a live teacher."""
    values: dict[str, Any] = {"max_seq_len": LENGTH} | changes
    return TrainSettings(
        student=str(student), out=Path("unused"), teacher=str(teacher), data=str(data), **values
    )


def source_of(settings: TrainSettings) -> Source:
    """The source, opened with the settings' student."""
    return open_source(settings, load_model(settings.student), QUIET)

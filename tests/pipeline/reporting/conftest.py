"""Two caches and a run, of text and names that try to be markup."""

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.reporting.images import find_browser
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.training.run import run_train
from tests.pipeline.reporting.browser import Browser, open_browser
from tests.tiny import build_tiny_model

ATTACK = "</script><script>window.attacked=1</script><img src=x onerror=window.attacked=2>"


@pytest.fixture(scope="session")
def attacked_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sketch cache whose teacher's name and whose text are HTML; in a folder beside `run`."""
    folder = tmp_path_factory.mktemp("report")
    teacher = build_tiny_model(folder / '"><script>window.attacked=3;', num_layers=3)
    data = folder / "text.txt"
    data.write_text(f"The quick brown fox & {ATTACK} naïve 東京 🙂.\n\tA teacher writes what it knows. " * 30)
    settings = CacheSettings(
        teacher=str(teacher),
        data=str(data),
        out=folder / "cache",
        max_seq_len=64,
        sketch_rank=8,
        batch_size=4,
        calibration_tokens=600,
        sequences_per_shard=16,
    )
    run_cache(settings, Console(quiet=True))
    return folder / "cache"


@pytest.fixture(scope="session")
def run_folder(attacked_cache: Path, tiny_student: Path) -> Path:
    """A run on that cache with held-out sequences."""
    out = attacked_cache.parent / "run"
    settings = TrainSettings(
        student=str(tiny_student),
        cache=attacked_cache,
        out=out,
        iters=12,
        learning_rate=1e-3,
        batch_size=2,
        steps_per_report=2,
        steps_per_eval=4,
        val_share=0.2,
    )
    run_train(settings, Console(quiet=True))
    return out


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; skips where there is none."""
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with open_browser(executable) as opened:
        yield opened


def tips(page: str, name: str = "tokens") -> list[dict[str, Any]]:
    """What a page shows for each coloured token."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    assert found is not None
    value: list[dict[str, Any]] = json.loads(found[1])
    return value


def coloured(page: str) -> list[tuple[str, int]]:
    """Text and colour level of every token that has a value, in order."""
    found = re.findall(r'<span class="t(?: v(\d))?" data-i="\d+" tabindex="-?\d">(.*?)</span>(?=<|\n)', page)
    return [(unescape(re.sub("<[^>]*>", "", text)), int(level or 0)) for level, text in found]

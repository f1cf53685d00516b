"""`status` on caches and runs at known moments."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.status import duration
from pipeline.training.finished import last_report
from pmetal_distill.offline.commit import Scratch
from pmetal_distill.offline.progress import cache_progress
from pmetal_distill.offline.store import Store
from tests.pipeline.conftest import Cli


@pytest.fixture
def partial(bucket_cache: Path, tmp_path: Path) -> Path:
    """Without its last shard; the others were committed ten seconds apart."""
    folder = Path(shutil.copytree(bucket_cache, tmp_path / "c"))
    records = sorted((folder / "commits").iterdir())
    records[-1].unlink()
    for index, path in enumerate(records[:-1]):
        os.utime(path, (1e9, 1e9 + 10 * index))
    return folder


def test_rate_and_time_left(partial: Path) -> None:
    store = Store.open(partial)
    counts = [store.record(shard).num_tokens for shard in store.committed()]
    assert len(counts) >= 2
    found = cache_progress(partial, now=1e9 + 10 * len(counts))
    assert (found.shards, found.tokens, found.complete) == (len(counts), sum(counts), False)
    assert found.tokens_per_second == pytest.approx(sum(counts[1:]) / (10 * (len(counts) - 1)))
    left = store.dataset.num_tokens - sum(counts)
    assert found.seconds_left == pytest.approx(left / found.tokens_per_second)
    assert found.idle_seconds == pytest.approx(10)


def test_a_clock_set_back_gives_no_figures_that_are_wrong(partial: Path) -> None:
    for path in (partial / "commits").iterdir():
        os.utime(path, (2e9, 2e9))
    found = cache_progress(partial, now=1e9)
    assert found.tokens_per_second is None
    assert found.seconds_left is None
    assert found.idle_seconds is None


def test_a_complete_cache_has_nothing_left(bucket_cache: Path) -> None:
    found = cache_progress(bucket_cache)
    assert found.complete
    assert found.seconds_left == 0
    assert found.writers == 0


def test_living_writers_are_counted_and_dead_ones_are_not(partial: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from pmetal_distill.offline.commit import Scratch
scratch = Scratch(Path({str(partial)!r}))
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with Scratch(partial):
        assert cache_progress(partial).writers == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert cache_progress(partial).writers == 0
    assert list((partial / "_tmp").glob("*.lock"))


def test_the_command(cli: Cli, partial: Path, tmp_path: Path) -> None:
    facts = cli("status", partial, "--json").json
    assert facts["kind"] == "cache"
    assert not facts["complete"]
    assert "time left" in cli("status", partial).out
    refused = cli("status", tmp_path)
    assert refused.code == 2
    assert "neither" in refused.err
    assert cli("status", partial, "--watch", 0).code == 2


def test_watching_ends_when_the_cache_is_complete(cli: Cli, bucket_cache: Path, partial: Path) -> None:
    missing = {p.name for p in (bucket_cache / "commits").iterdir()} - {
        p.name for p in (partial / "commits").iterdir()
    }
    code = (
        "import time, shutil; time.sleep(1); "
        f"[shutil.copy('{bucket_cache}/commits/' + n, {str(partial / 'commits')!r}) "
        f"for n in {sorted(missing)!r}]"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    started = time.monotonic()
    got = cli("status", partial, "--watch", 0.05)
    process.wait()
    assert got.code == 0
    assert time.monotonic() - started >= 0.5
    assert got.out.count("shards") > 2
    assert f"{cache_progress(partial).num_shards} of {cache_progress(partial).num_shards}" in got.out


def test_a_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("student: s\ncache: c\nout: o\niters: 40\n")
    assert cli("status", tmp_path, "--json").json["iteration"] == 0
    lines = [{"iteration": 10, "loss": 2.0, "seconds": 5.0}, {"iteration": 10, "val_loss": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"iterat')
    facts = cli("status", tmp_path, "--json").json
    assert (facts["iteration"], facts["iters"], facts["loss"]) == (10, 40, 2.0)
    assert facts["seconds_left"] == pytest.approx(15)
    assert "10 of 40" in cli("status", tmp_path).out
    assert last_report(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown"), (0, "0:00"), (61.4, "1:01"), (3723, "1:02:03")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text

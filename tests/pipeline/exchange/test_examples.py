"""examples/read_cache.py reads what our own reader reads, through every engine that is installed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples.read_cache import ENGINES, open_cache, read_all
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.exchange.conftest import TEXTS, own_cache

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tail", ["none", "bucket", "sketch"])
def test_values_are_those_of_the_reader(engine: str, tail: str, tiny_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    folder = own_cache(tiny_teacher, TEXTS, tmp_path, tail=tail, sketch_rank=8, sequences_per_shard=4)
    cache = LogitCache(folder)
    rows = [cache.sequence(number) for number in range(cache.num_sequences)]
    found = read_all(open_cache(folder), engine)
    mask = np.concatenate([row.loss_mask for row in rows])
    np.testing.assert_array_equal(found["token_ids"], np.concatenate([row.token_ids for row in rows]))
    np.testing.assert_array_equal(found["mask"], mask)
    ids = np.concatenate([row.targets.head_ids for row in rows])
    logprobs = np.concatenate([row.targets.head_logprobs for row in rows])
    np.testing.assert_array_equal(found["head_ids"][mask], ids[mask])
    np.testing.assert_allclose(found["head_logprobs"][mask], logprobs[mask], atol=1e-5)


def test_it_runs_and_says_what_it_skips(own: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "read_cache.py"), str(own)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in lines] == list(ENGINES)
    assert "tokens" in lines[0]
    assert all("tokens" in line or "not installed" in line for line in lines)

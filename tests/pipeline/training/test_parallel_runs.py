"""`train` in several processes: the losses of one, a lost process, another number of processes afterwards."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks, start_ranks, wait_ranks

CLI = ("-c", "from pipeline.cli import main; main()")


@pytest.fixture
def words(tiny_student: Path, bucket_cache: Path) -> tuple[object, ...]:
    return (
        *(*CLI, "train", "--student", tiny_student, "--cache", bucket_cache, "--batch-size", 3),
        *("--iters", 12, "--steps-per-report", 1, "--learning-rate", 1e-3, "--save-every", 2, "--json"),
    )


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 13))
    return [line["loss"] for line in lines]


@pytest.fixture
def alone(words: Any, tmp_path: Path) -> list[float]:
    [end] = run_ranks([*words, "--out", tmp_path / "one"], 1, tmp_path)
    assert end.code == 0, end.err
    return losses(tmp_path / "one")


def test_two_processes_report_the_losses_of_one(words: Any, alone: list[float], tmp_path: Path) -> None:
    leader, other = run_ranks([*words, "--out", tmp_path / "two"], 2, tmp_path)
    assert (leader.code, other.code) == (0, 0), leader.err + other.err
    np.testing.assert_allclose(losses(tmp_path / "two"), alone, rtol=1e-5)
    assert (tmp_path / "two" / "model" / "config.json").exists()
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert json.loads(leader.out)["tokens"] == one["tokens"]
    assert other.out == other.err == ""


def test_a_lost_process_ends_the_run_and_any_number_goes_on(
    words: Any, alone: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    leader, victim = start_ranks([*words, "--out", run], 2, tmp_path)
    while len(list((run / "checkpoints").glob("*.safetensors"))) < 2 and leader.poll() is None:
        time.sleep(0.01)
    victim.kill()
    ended, _ = wait_ranks([leader, victim])
    assert ended.code == 1, ended.err
    assert "--resume" in ended.err
    assert not (run / "result.json").exists()
    ends = run_ranks([*words, "--out", run, "--resume"], 3, tmp_path)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].err
    np.testing.assert_allclose(losses(run), alone, rtol=1e-5)


def test_a_used_folder_stops_all_of_them(words: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    ends = run_ranks([*words, "--out", tmp_path / "run"], 2, tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert "in use" in ends[0].err


def test_more_processes_than_sequences_in_a_batch(words: Any, tmp_path: Path) -> None:
    ends = run_ranks([*words, "--batch-size", 1, "--out", tmp_path / "run"], 2, tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert "one sequence for each process" in ends[0].err

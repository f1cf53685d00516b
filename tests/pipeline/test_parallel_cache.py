"""`cache` in several processes: shared work, one content, and nobody needed to the end."""

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stage_one import own_first
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.verify import verify_cache
from tests.ranks import run_ranks, start_ranks, wait_ranks

CLI = ("-c", "from pipeline.cli import main; main()")


@pytest.fixture
def words(tiny_teacher: Path, text_file: Path) -> tuple[object, ...]:
    return (
        *(*CLI, "cache", "--teacher", tiny_teacher, "--data", text_file, "--tail", "bucket", "--json"),
        *("--max-seq-len", 64, "--batch-size", 2, "--sequences-per-shard", 2, "--head-chunk", 50),
    )


def same_content(one: Path, two: Path) -> None:
    a, b = LogitCache(one), LogitCache(two)
    assert a.numbers.tolist() == b.numbers.tolist()
    for number in a.numbers.tolist():
        x, y = a.sequence(number), b.sequence(number)
        for left, right in zip(x.targets.parts(), y.targets.parts(), strict=True):
            np.testing.assert_array_equal(left, right)


@given(st.integers(0, 40), st.integers(1, 7))
def test_everybody_would_do_everything_and_begins_elsewhere(count: int, size: int) -> None:
    shards = [3 * n for n in range(count)]
    orders = [own_first(shards, rank, size) for rank in range(size)]
    assert all(sorted(order) == shards for order in orders)
    own = [order[: count // size] for order in orders]
    assert len({shard for block in own for shard in block}) == size * (count // size)


def test_who_comes_to_help_begins_where_the_owner_ends() -> None:
    assert own_first(range(6), 0, 2) == [0, 1, 2, 5, 4, 3]
    assert own_first(range(6), 1, 2) == [3, 4, 5, 2, 1, 0]


@pytest.mark.parametrize("size", [2, 3])
def test_the_cache_of_several_processes_is_that_of_one(
    words: tuple[object, ...], tmp_path: Path, size: int
) -> None:
    run_ranks([*words, "--out", tmp_path / "one"], 1, tmp_path)
    ends = run_ranks([*words, "--out", tmp_path / "several"], size, tmp_path)
    assert [end.code for end in ends] == [0] * size, ends[0].err
    assert verify_cache(tmp_path / "several").ok
    same_content(tmp_path / "one", tmp_path / "several")
    said = json.loads(ends[0].out)
    assert said["new_tokens"] <= said["tokens"]
    assert [end.out for end in ends[1:]] == [""] * (size - 1)


def test_the_rest_finish_what_a_lost_process_leaves(words: tuple[object, ...], tmp_path: Path) -> None:
    run_ranks([*words, "--out", tmp_path / "one"], 1, tmp_path)
    out = tmp_path / "two"
    processes = start_ranks([*words, "--out", out], 2, tmp_path)
    while not list((out / "commits").glob("*.json")) and processes[0].poll() is None:
        time.sleep(0.005)
    processes[1].kill()
    survivor, lost = wait_ranks(processes)
    assert (survivor.code, lost.code) == (0, -9), survivor.err
    assert verify_cache(out).ok
    same_content(tmp_path / "one", out)


def test_a_restart_with_another_number_completes(words: tuple[object, ...], tmp_path: Path) -> None:
    out = tmp_path / "c"
    processes = start_ranks([*words, "--out", out], 2, tmp_path)
    while not list((out / "commits").glob("*.json")) and processes[0].poll() is None:
        time.sleep(0.005)
    for process in processes:
        process.kill()
    wait_ranks(processes)
    ends = run_ranks([*words, "--out", out, "--resume"], 3, tmp_path)
    assert [end.code for end in ends] == [0, 0, 0], ends[0].err
    assert verify_cache(out).ok
    numbers = LogitCache(out).numbers.tolist()
    assert all(after == before + 1 for before, after in pairwise(numbers))


def test_a_used_folder_stops_all_of_them(words: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    ends = run_ranks([*words, "--out", tmp_path / "c"], 2, tmp_path)
    assert [end.code for end in ends] == [2, 2]
    assert "in use" in ends[0].err

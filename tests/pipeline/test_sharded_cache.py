"""`cache --sharded`: a teacher in the memory of several processes says what a whole one says."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.verify import verify_cache
from tests.ranks import run_ranks, start_ranks, wait_ranks
from tests.tiny import build_tiny_model

CLI = ("-c", "from pipeline.cli import main; main()")


def words(teacher: Path, text_file: Path, *more: object) -> tuple[object, ...]:
    return (
        *(*CLI, "cache", "--teacher", teacher, "--data", text_file, "--json", "--max-seq-len", 64),
        *("--batch-size", 2, "--sequences-per-shard", 4, "--head-chunk", 50, *more),
    )


def assert_close(one: Path, two: Path, layers: tuple[int, ...] = ()) -> None:
    a, b = LogitCache(one, hidden_layers=layers), LogitCache(two, hidden_layers=layers)
    assert a.numbers.tolist() == b.numbers.tolist()
    for number in a.numbers.tolist():
        x, y = a.sequence(number), b.sequence(number)
        np.testing.assert_array_equal(x.token_ids, y.token_ids)
        # Stored in steps: values at a border may differ by one, and equal ones may change places.
        spec = a.dataset.target
        gaps = -np.diff(x.targets.head_logprobs, axis=1) > 1.5 * spec.logprob_step
        apart = np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)[:, :-1] & gaps
        assert apart.mean() > 0.5
        np.testing.assert_array_equal(x.targets.head_ids[:, :-1][apart], y.targets.head_ids[:, :-1][apart])
        np.testing.assert_allclose(
            x.targets.head_logprobs, y.targets.head_logprobs, atol=1.01 * spec.logprob_step + 1e-4
        )
        np.testing.assert_allclose(
            x.targets.tail_curve, y.targets.tail_curve, atol=2 * spec.curve_step + 1e-4
        )
        for layer in layers:
            np.testing.assert_allclose(
                x.hidden[layer], y.hidden[layer], atol=0.02 * np.abs(x.hidden[layer]).max()
            )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_cache_of_a_sharded_teacher_is_that_of_a_whole_one(
    kind: str, text_file: Path, tmp_path: Path
) -> None:
    teacher = build_tiny_model(tmp_path / "teacher", model_type=kind)
    asked = words(
        teacher, text_file, "--sketch-rank", 8, "--calibration-tokens", 500, "--hidden-layers", "0,3"
    )
    run_ranks([*asked, "--out", tmp_path / "one"], 1, tmp_path)
    leader, other = run_ranks([*asked, "--out", tmp_path / "two", "--sharded"], 2, tmp_path)
    assert (leader.code, other.code) == (0, 0), leader.err + other.err
    assert verify_cache(tmp_path / "two").ok
    assert_close(tmp_path / "one", tmp_path / "two", (0, 3))
    said = json.loads(leader.out)
    assert said["new_tokens"] == said["tokens"]
    assert other.out == other.err == ""


def test_a_lost_share_ends_the_others_and_any_number_goes_on(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "long.jsonl"
    text.write_text(text_file.read_text() * 8)  # longer than the sample, whose states would be kept
    asked = words(tiny_teacher, text, "--tail", "bucket")
    out = tmp_path / "c"
    leader, victim = start_ranks([*asked, "--out", out, "--sharded"], 2, tmp_path)
    while not list((out / "commits").glob("*.json")) and leader.poll() is None:
        time.sleep(0.005)
    victim.kill()
    ended, _ = wait_ranks([leader, victim])
    assert ended.code == 1, ended.out
    assert "--resume" in ended.err
    [end] = run_ranks([*asked, "--out", out, "--resume"], 1, tmp_path)
    assert end.code == 0, end.err
    assert verify_cache(out).ok


def test_an_error_of_the_leader_lets_the_others_go(
    tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = words(tiny_teacher, text_file, "--top-k", 5000, "--out", tmp_path / "c", "--sharded")
    leader, other = run_ranks(asked, 2, tmp_path)
    assert (leader.code, other.code) == (2, 0), other.err
    assert "top_k" in leader.err


def test_without_a_launcher_it_says_how_to_start(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> None:
    [end] = run_ranks([*words(tiny_teacher, text_file), "--out", tmp_path / "c", "--sharded"], 1, tmp_path)
    assert end.code == 2
    assert "mlx.launch -n 2" in end.err


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("gemma", 2, "model_type 'gemma', which has no such method"),
        ("llama", 3, "num_attention_heads must be a multiple of the number of processes, found 4 for 3"),
        ("llama", 4, "num_key_value_heads must be a multiple of the number of processes, found 2 for 4"),
    ],
)
def test_what_cannot_be_split_is_refused_by_all(
    kind: str, size: int, said: str, text_file: Path, tmp_path: Path
) -> None:
    teacher = build_tiny_model(tmp_path / "teacher", model_type=kind)
    asked = words(teacher, text_file, "--out", tmp_path / "c", "--sharded")
    ends = run_ranks(asked, size, tmp_path)
    assert [end.code for end in ends] == [1] * size
    assert said in ends[0].err
    assert "run it without --sharded" in ends[0].err

"""Batches of fixed composition, states that are kept, samples."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from pipeline.batching import TokenBatch
from pipeline.teacher import TeacherRunner, TeacherStates
from pipeline.text import packed_text
from pmetal_distill.models import load_model


@pytest.fixture
def runner(tiny_teacher: Path, text_file: Path) -> TeacherRunner:
    model = load_model(tiny_teacher)
    data = packed_text(str(text_file), model, split="train", max_seq_len=48)
    return TeacherRunner(model, data, batch_size=4)


def calls(runner: TeacherRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the teacher's forward passes from now on."""
    seen: list[int] = []
    forward = TeacherRunner._forward

    def counted(self: TeacherRunner, batch: TokenBatch) -> TeacherStates:
        seen.append(1)
        return forward(self, batch)

    monkeypatch.setattr(TeacherRunner, "_forward", counted)
    return seen


def one_by_one(found: Iterable[TeacherStates]) -> dict[int, np.ndarray]:
    """Final states of each sequence by its number."""
    return {
        number: np.array(states.final)[states.starts[i] : states.starts[i + 1]]
        for states in found
        for i, number in enumerate(states.batch.sequences)
    }


def same(a: TeacherStates, b: TeacherStates) -> None:
    assert a.batch.sequences == b.batch.sequences
    np.testing.assert_array_equal(np.array(a.final), np.array(b.final))


def test_a_sequence_is_computed_alike_alone_and_among_others(runner: TeacherRunner) -> None:
    count = runner.dataset.num_sequences
    everything = one_by_one(runner.run(range(count)))
    assert list(everything) == list(range(count))
    for number, states in one_by_one(runner.run([2, 9])).items():
        np.testing.assert_array_equal(states, everything[number])


def test_only_trained_positions_are_kept(runner: TeacherRunner) -> None:
    found = list(runner.run(range(runner.dataset.num_sequences)))
    assert all(len(states.final) == states.batch.loss_mask.sum() for states in found)
    assert sum(len(states.final) for states in found) == runner.dataset.num_targets
    assert runner.dataset.num_targets < runner.dataset.num_tokens


def test_rows_know_their_place(runner: TeacherRunner) -> None:
    states = next(iter(runner.run([4, 5, 6, 7])))
    row = 0
    for i, number in enumerate(states.batch.sequences):
        for position in np.flatnonzero(states.batch.loss_mask[i]):
            assert states.place(row) == f"sequence {number} position {position}"
            row += 1
    assert row == len(states.final)


def test_a_part_of_a_batch_has_its_own_rows_and_layers(tiny_teacher: Path, runner: TeacherRunner) -> None:
    runner.layers = (1,)
    whole = next(iter(runner.run([4, 5, 6, 7])))
    part = next(iter(runner.run([5, 7])))
    assert part.batch.sequences == [5, 7]
    np.testing.assert_array_equal(part.batch.token_ids, whole.batch.token_ids[[1, 3]])
    np.testing.assert_array_equal(np.array(part.layers[1]), np.array(whole.layers[1])[[1, 3]])


def test_a_batch_that_two_shards_share_runs_once(
    runner: TeacherRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(runner, monkeypatch)
    parts = [list(runner.run(shard)) for shard in (range(6), range(6, 12))]
    assert [len(part) for part in parts] == [2, 2]
    assert len(seen) == 3


def test_a_sample_equals_the_main_pass_within_rounding(runner: TeacherRunner) -> None:
    chosen = [1, 6, 7, 10]
    exact = one_by_one(runner.run(chosen))
    for number, states in one_by_one(runner.sample(chosen)).items():
        np.testing.assert_allclose(states, exact[number], atol=1e-4)


def test_kept_states_are_not_computed_again(runner: TeacherRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = range(runner.dataset.num_sequences)
    runner.keep_tokens = runner.dataset.num_targets
    seen = calls(runner, monkeypatch)
    first = list(runner.run(numbers, keep=True))
    passes = len(seen)
    for a, b, c in zip(first, runner.run(numbers, keep=True), runner.run(numbers), strict=True):
        same(a, b)
        same(a, c)
    assert len(seen) == passes
    list(runner.run(numbers))
    assert len(seen) == 2 * passes


def test_no_more_is_kept_than_allowed(runner: TeacherRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner.keep_tokens = 100
    list(runner.run(range(8), keep=True))
    seen = calls(runner, monkeypatch)
    list(runner.run(range(8)))
    assert len(seen) == 2


def test_states_that_the_main_pass_is_beyond_make_room(
    runner: TeacherRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.keep_tokens = 200
    list(runner.run(range(4), keep=True))
    runner.forget_before(4)
    list(runner.run(range(4, 8), keep=True))
    seen = calls(runner, monkeypatch)
    list(runner.run(range(8)))
    assert len(seen) == 1

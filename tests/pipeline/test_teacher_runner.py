"""Batches of fixed composition, states that are kept, samples."""

from pathlib import Path

import numpy as np
import pytest

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

    def counted(self: TeacherRunner, batch: object) -> object:
        seen.append(1)
        return forward(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(TeacherRunner, "_forward", counted)
    return seen


def same(a: TeacherStates, b: TeacherStates, *, atol: float = 0.0) -> None:
    assert a.number == b.number
    np.testing.assert_array_equal(a.token_ids, b.token_ids)
    np.testing.assert_allclose(np.array(a.final), np.array(b.final), atol=atol)


def test_a_sequence_is_computed_alike_alone_and_among_others(runner: TeacherRunner) -> None:
    everything = {states.number: states for states in runner.run(range(runner.dataset.num_sequences))}
    assert list(everything) == list(range(runner.dataset.num_sequences))
    for states in runner.run([2, 9]):
        same(states, everything[states.number])


def test_only_trained_positions_are_kept(runner: TeacherRunner) -> None:
    sequences = list(runner.run(range(runner.dataset.num_sequences)))
    assert all(len(states.final) == states.loss_mask.sum() for states in sequences)
    assert sum(len(states.final) for states in sequences) == runner.dataset.num_targets
    assert runner.dataset.num_targets < runner.dataset.num_tokens


def test_a_sample_equals_the_main_pass_within_rounding(runner: TeacherRunner) -> None:
    chosen = [1, 6, 7, 10]
    for sampled, exact in zip(runner.sample(chosen), runner.run(chosen), strict=True):
        same(sampled, exact, atol=1e-4)


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

"""Which checkpoints a run keeps, and what it does when one cannot be written or read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.console import Console
from pipeline.settings import TrainSettings
from pipeline.training import output
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.loop import criterion
from pipeline.training.validation import Validator
from pmetal_distill.checkpoint import TrainingState, list_states
from schemas.errors import CheckpointError, CorruptionError, NonFiniteError, VersionError
from tests.limits import file_size_limit
from tests.pipeline.training.runs import QUIET, assert_same_run, run_settings, stop_after, train

Make = Callable[..., TrainSettings]


@pytest.fixture
def make(tiny_student: Path, short_cache: Path, tmp_path: Path) -> Make:
    """Settings of a run in a folder of this name."""
    return lambda name, **changes: run_settings(
        student=tiny_student, cache=short_cache, out=tmp_path / name, **changes
    )


def numbers(settings: TrainSettings) -> list[int]:
    return [file.number for file in list_states(settings.out / "checkpoints")]


def state(value: float = 1.0) -> TrainingState:
    return TrainingState({"trained.w": mx.full((100,), value)}, {"note": value})


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


class TestKeeping:
    def test_the_last_ones_and_the_best_stay(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "c", keep=2)
        for iteration in (2, 4, 6, 8):
            checkpoints.save(iteration, state(iteration), best=4 if iteration >= 4 else None)
        assert [file.number for file in list_states(tmp_path / "c")] == [4, 6, 8]
        checkpoints.save(10, state(10), best=10)
        assert [file.number for file in list_states(tmp_path / "c")] == [8, 10]

    def test_what_a_damaged_future_left_goes(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "c", keep=2)
        for iteration in (2, 4):
            checkpoints.save(iteration, state(iteration), best=None)
        checkpoints.save(3, state(3), best=None)
        assert [file.number for file in list_states(tmp_path / "c")] == [2, 3]

    def test_a_run_keeps_its_best_by_held_out_divergence(self, make: Make, monkeypatch: Any) -> None:
        figures = iter([3.0, 1.0, 2.0, 1.5])
        monkeypatch.setattr(Validator, "run", lambda self: {"val_loss": 9.0, "val_kl@1": next(figures)})
        settings = make("run", steps_per_eval=3, save_every=5, keep_checkpoints=1)
        result = train(settings)
        assert numbers(settings) == [6, 12]
        assert result["best_iteration"] == 6
        assert result["val_kl@1"] == 1.5

    @pytest.mark.parametrize(
        ("evaluation", "value"),
        [
            ({"val_loss": 1.0, "val_kl@2": 3.0, "val_kl@1": 2.0}, 2.0),
            ({"val_loss": 1.0, "val_kl@2": 3.0}, 3.0),
            ({"val_loss": 1.0}, 1.0),
            ({"val_kl@1": float("nan")}, None),
            ({}, None),
        ],
    )
    def test_what_best_means(self, evaluation: dict[str, float], value: float | None) -> None:
        assert criterion(evaluation) == value

    def test_none_are_written_if_none_are_wanted(self, make: Make) -> None:
        settings = make("run", iters=2, save_every=0)
        train(settings)
        assert numbers(settings) == []

    def test_weights_that_are_no_numbers_are_refused(self, tmp_path: Path) -> None:
        checkpoints = Checkpoints(tmp_path / "c", keep=2)
        checkpoints.save(2, state(), best=None)
        with pytest.raises(NonFiniteError, match="iteration 4: the weights must be finite, found 1 tensors"):
            checkpoints.save(4, state(float("nan")), best=None)
        assert [file.number for file in list_states(tmp_path / "c")] == [2]


@contextmanager
def stopped(settings: TrainSettings, step: int) -> Iterator[None]:
    """A run that fails behind so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    yield


class TestDamage:
    def test_the_newest_intact_one_is_taken(self, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
        train(make("straight"))
        settings = make("damaged", resume=True)
        with stopped(make("damaged"), 9):
            assert numbers(settings) == [6, 8]
            flip_a_bit(list_states(settings.out / "checkpoints")[-1].path)
        train(settings, Console())
        said = capsys.readouterr().err
        assert "damaged checkpoint: checkpoints/00000008-" in said
        assert "must have the SHA-256" in said
        assert "going on behind batch 6 of 12" in said
        assert_same_run(make("straight").out, settings.out)

    def test_if_all_are_damaged_it_says_so(self, make: Make) -> None:
        settings = make("damaged", resume=True)
        with stopped(make("damaged"), 5):
            for file in list_states(settings.out / "checkpoints"):
                file.path.write_bytes(file.path.read_bytes()[:-1])
        with pytest.raises(
            CorruptionError, match=r"must be intact, found 2 damaged; remove the folder to begin"
        ):
            train(settings)

    def test_one_of_a_newer_version_is_refused(self, tmp_path: Path, monkeypatch: Any) -> None:
        checkpoints = Checkpoints(tmp_path / "c", keep=2)
        monkeypatch.setattr("pipeline.training.checkpoints.VERSION", 2)
        checkpoints.save(2, state(), best=None)
        monkeypatch.undo()
        with pytest.raises(VersionError, match="must be of version 1 or before, found 2; update"):
            checkpoints.latest(QUIET)


class TestFullDisk:
    def test_at_a_checkpoint_the_one_before_stays(self, make: Make) -> None:
        train(make("straight"))
        settings, inner = make("full"), Checkpoints.save

        def save_on_a_full_disk(self: Checkpoints, iteration: int, *args: Any, **kwargs: Any) -> Any:
            if iteration < 6:
                return inner(self, iteration, *args, **kwargs)
            with file_size_limit(50_000):
                return inner(self, iteration, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_on_a_full_disk)
            with pytest.raises(
                CheckpointError, match=r"checkpoints/00000006: must be written in full, found .*--resume"
            ):
                train(settings)
        assert numbers(settings) == [2, 4]
        train(replace(settings, resume=True))
        assert_same_run(make("straight").out, settings.out)

    def test_at_the_end_the_last_checkpoint_gives_the_model(self, make: Make) -> None:
        train(make("straight"))
        settings, inner = make("full"), output.write_outputs

        def write_on_a_full_disk(*args: Any) -> Any:
            with file_size_limit(50_000):
                return inner(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output, "write_outputs", write_on_a_full_disk)
            with pytest.raises(CheckpointError, match=r"what was trained must be written in full.*--resume"):
                train(settings)
        assert not (settings.out / "model").exists()
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 0, AssertionError)
            train(replace(settings, resume=True))
        assert_same_run(make("straight").out, settings.out)

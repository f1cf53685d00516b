"""What a run refuses, what it goes on with, and how it ends: finished, interrupted, or in an error."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.config import load_config, save_config
from pipeline.console import Console
from pipeline.settings import LrSchedule, TrainSettings
from pipeline.training.folder import RunFolder
from pipeline.training.identity import FREE, deciding_settings
from pmetal_distill.checkpoint import list_states
from pmetal_distill.distiller import Distiller
from schemas.errors import CheckpointError, NonFiniteError, PmetalError, UsageError
from tests.pipeline.conftest import Cli
from tests.pipeline.training.runs import QUIET, assert_same_run, lines, run_settings, stop_after, train
from tests.pipeline.training.sources import make_cache
from tests.tiny import build_tiny_model

Make = Callable[..., TrainSettings]


@pytest.fixture
def make(tiny_student: Path, short_cache: Path, tmp_path: Path) -> Make:
    """Settings of a run of four batches."""
    values: dict[str, Any] = {"cache": short_cache, "out": tmp_path / "run", "iters": 4, "val_share": 0.0}
    return lambda **changes: run_settings(**({"student": tiny_student} | values | changes))


@pytest.fixture
def stopped(make: Make) -> TrainSettings:
    """Of a run that was interrupted behind its third batch and has a checkpoint there."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            train(make())
    return make(resume=True)


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestFolder:
    def test_a_used_one_is_refused_and_left_alone(self, make: Make) -> None:
        train(make(iters=2))
        before = content(make().out)
        with pytest.raises(UsageError, match=r"must be new or empty, found it in use.*--resume to go on"):
            train(make())
        assert content(make().out) == before

    def test_resuming_what_is_no_run_is_refused(self, make: Make, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").touch()
        with pytest.raises(UsageError, match=r"must hold a run to go on with, found no config\.yaml"):
            train(make(resume=True))

    def test_resuming_nothing_begins_and_says_so(
        self, make: Make, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(make(resume=True, iters=2), Console())
        assert "no checkpoint to go on from; the run begins anew" in capsys.readouterr().err
        assert len(lines(make().out)) == 2
        assert load_config(make().out / "config.yaml", TrainSettings)["resume"] is False

    def test_only_one_process_trains_in_it(self, make: Make) -> None:
        with RunFolder.open(make()), pytest.raises(UsageError, match="one process at a time"):
            RunFolder.open(make(resume=True))
        RunFolder.open(make()).__exit__(None, None, None)

    def test_a_finished_run_is_left_as_it_is(self, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
        result = train(make())
        before = content(make().out)
        assert train(make(resume=True, prefetch=0), Console()) == result
        assert "the run is finished; nothing was changed" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=r"^--iters: must be 4, as when this run began, found 3"):
            train(make(resume=True, iters=3))
        assert content(make().out) == before

    def test_a_finished_run_is_made_longer(
        self, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flat = {"lr_schedule": "constant", "warmup": 0}
        train(make(**flat))
        train(make(**flat, resume=True, iters=7))
        train(make(**flat, iters=7, out=tmp_path / "straight"))
        assert_same_run(make().out, tmp_path / "straight")
        assert load_config(make().out / "config.yaml", TrainSettings)["iters"] == 7

    def test_a_longer_run_that_is_stopped_goes_on(
        self, make: Make, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(make())
        longer = make(resume=True, iters=9)
        for after in (1, 3):  # before the first new checkpoint, and after it
            with pytest.MonkeyPatch.context() as patch:
                stop_after(patch, after, KeyboardInterrupt)
                with pytest.raises(KeyboardInterrupt):
                    train(longer, Console())
            assert not (longer.out / "result.json").exists()
        assert "--iters: 9 in place of 4; learning rates go on as those of" in capsys.readouterr().err
        train(longer)
        assert [line["iteration"] for line in lines(longer.out)] == list(range(1, 10))
        rates = [line["learning_rate"] for line in lines(longer.out)]
        assert rates[4:] == sorted(rates[4:], reverse=True)

    def test_a_finished_run_without_checkpoints_cannot_be_made_longer(self, make: Make) -> None:
        train(make(save_every=0))
        before = content(make().out)
        with pytest.raises(CheckpointError, match=r"^--iters: .* from its last checkpoint, found none"):
            train(make(save_every=0, resume=True, iters=9))
        assert content(make().out) == before


class TestSameRun:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"learning_rate": 2e-3},
                r"^--learning-rate: must be 0\.001, as when this run began, found 0\.002; give",
            ),
            ({"iters": 5}, "^--iters: must be 4, as when this run began, found 5"),
            ({"temperature": 3.0}, r"^--temperature: must be 2\.0, as when .* found 3\.0"),
            ({"grad_clip": None}, r"^--grad-clip: must be 1\.0, .* found None"),
            (
                {"optimizer_config": {"adamw": {"eps": 1e-6}}},
                r"^'optimizer_config' in the file: must be \{\}, .* found \{'adamw'",
            ),
        ],
    )
    def test_another_setting_is_refused_by_its_name(
        self, changes: dict[str, Any], message: str, stopped: TrainSettings
    ) -> None:
        before = content(stopped.out)
        with pytest.raises(CheckpointError, match=message):
            train(replace(stopped, **changes))
        assert content(stopped.out) == before

    def test_another_student_is_refused(self, stopped: TrainSettings, tmp_path: Path) -> None:
        other = build_tiny_model(tmp_path / "other", num_layers=2, seed=7)
        with pytest.raises(
            CheckpointError,
            match=r"^--student: must be what this run began with, .*/student, found .*/other; give that",
        ):
            train(replace(stopped, student=str(other)))

    def test_another_cache_is_refused(
        self, stopped: TrainSettings, tmp_path: Path, tiny_teacher: Path, text_file: Path
    ) -> None:
        other = make_cache(tiny_teacher, text_file, tmp_path / "other", top_k=4)
        with pytest.raises(
            CheckpointError, match=r"^--cache: must be what this run began with, .*short, found .*other;"
        ):
            train(replace(stopped, cache=other))

    def test_other_content_in_the_same_place_is_refused(
        self, make: Make, tmp_path: Path, tiny_student: Path
    ) -> None:
        student = Path(shutil.copytree(tiny_student, tmp_path / "student"))
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 2, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                train(make(student=student))
        shutil.rmtree(student)
        build_tiny_model(student, num_layers=2, seed=7)
        with pytest.raises(CheckpointError, match=r"^--student: .*/student, found other content there \(SHA"):
            train(make(student=student, resume=True))

    def test_moved_folders_are_the_same(self, stopped: TrainSettings, tmp_path: Path) -> None:
        assert stopped.cache is not None
        cache = Path(shutil.copytree(stopped.cache, tmp_path / "moved-cache"))
        student = Path(shutil.copytree(stopped.student, tmp_path / "moved-student"))
        out = Path(shutil.move(stopped.out, tmp_path / "moved-run"))
        train(replace(stopped, cache=cache, student=str(student), out=out))
        train(replace(stopped, resume=False))
        assert_same_run(stopped.out, out)

    def test_what_decides_nothing_may_change(self, stopped: TrainSettings) -> None:
        changes = {"prefetch": 0, "steps_per_report": 2, "save_every": 0, "keep_checkpoints": 5, "fuse": True}
        assert changes.keys() <= FREE
        train(replace(stopped, **changes))
        assert [line["iteration"] for line in lines(stopped.out)] == [1, 2, 4]

    @pytest.mark.parametrize(
        ("changes", "free"),
        [
            ({}, False),
            ({"lr_schedule": "constant"}, False),
            ({"lr_schedule": "constant", "warmup": 0}, True),
            ({"warmup": 5}, False),
            ({"lr_schedule": LrSchedule("cosine_decay", (1e-3, 50.0))}, True),
        ],
    )
    def test_the_length_may_change_where_no_learning_rate_follows_from_it(
        self, changes: dict[str, Any], free: bool, make: Make
    ) -> None:
        assert ("iters" not in deciding_settings(make(**changes))) is free

    def test_a_longer_run_is_the_run_that_was_long_from_the_start(self, make: Make, tmp_path: Path) -> None:
        flat = {"lr_schedule": "constant", "warmup": 0}
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 3, KeyboardInterrupt)
            with pytest.raises(KeyboardInterrupt):
                train(make(**flat))
        train(make(**flat, resume=True, iters=6))
        train(make(**flat, iters=6, out=tmp_path / "straight"))
        assert_same_run(make().out, tmp_path / "straight")


class TestInterrupts:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_ends_it_behind_a_checkpoint(
        self, number: signal.Signals, make: Make, cli: Cli, tmp_path: Path
    ) -> None:
        settings = make(iters=100_000, lr_schedule="constant", warmup=0, save_every=0)
        save_config(settings, tmp_path / "run.yaml")
        code = "import sys; from pipeline.cli import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "train", "-c", str(tmp_path / "run.yaml")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            wait_for_lines(process, settings.out, 3)
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read()
        assert process.returncode == 130, said
        last = lines(settings.out)[-1]["iteration"]
        assert f"stopped behind batch {last:,} of 100,000, its checkpoint is written" in said
        assert f"'pmetal-pipeline train -c {settings.out}/config.yaml --resume'" in said
        assert [file.number for file in list_states(settings.out / "checkpoints")] == [last]
        words = ("-c", settings.out / "config.yaml", "--resume", "--iters", last + 2)
        assert cli("train", *words).code == 0
        train(replace(settings, iters=last + 2, out=tmp_path / "straight"))
        assert_same_run(settings.out, tmp_path / "straight")

    def test_the_second_signal_ends_it_at_once(self) -> None:
        code = (
            "import mlx.core as mx\nfrom pipeline.training.interrupts import Interrupts\n"
            "a = mx.random.normal((3000, 3000))\nmx.eval(a)\n"
            "with Interrupts():\n    print('ready', flush=True)\n"
            "    for _ in range(2000):\n        a = a @ a * 1e-3\n    mx.eval(a)\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
            assert process.stderr.read() == "stopped at once\n"

    def test_handlers_are_put_back(self, make: Make) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        train(make(iters=1))
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def wait_for_lines(process: "subprocess.Popen[str]", out: Path, count: int) -> None:
    """Until a run has reported so often."""
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        time.sleep(0.01)


class TestNumbers:
    def test_weights_that_are_none_are_not_saved(self, make: Make) -> None:
        settings = make(learning_rate=1e38, warmup=0, save_every=1, optimizer="sgd", iters=9)
        with pytest.raises(
            NonFiniteError, match=r"the weights must be finite, found \d+ tensors that are not"
        ):
            train(settings)
        for file in list_states(settings.out / "checkpoints"):
            assert all(mx.isfinite(array).all().item() for array in file.read().arrays.values())

    def test_a_loss_that_is_none_is_told_with_its_rows_and_the_checkpoint_stays(self, make: Make) -> None:
        inner, read = Distiller.step, []

        def step(self: Distiller, batch: Any, **named: Any) -> Any:
            read.append(batch.numbers.tolist())
            parts = inner(self, batch, **named)
            return parts._replace(total=mx.array(float("nan"))) if len(read) == 4 else parts

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Distiller, "step", step)
            with pytest.raises(NonFiniteError) as caught:
                train(make(save_every=3))
        assert str(caught.value).startswith(
            f"iteration 4: the loss must be finite, found nan on sequences {read[3]}; lower the learning rate"
        )
        assert [file.read().record["iteration"] for file in list_states(make().out / "checkpoints")] == [3]


def test_a_run_that_cannot_begin_leaves_nothing(make: Make) -> None:
    with pytest.raises(PmetalError):
        train(make(cache=Path("nowhere")), QUIET)
    assert not make().out.exists()

"""States on disk: the bytes come back or an error does; a distiller that takes one over goes on exactly."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill.checkpoint import StateFile, TrainingState, list_states, remove_states, write_state
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.losses.hidden import HiddenStateLoss
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.schedule import TemperatureSchedule
from schemas.errors import CheckpointError, CorruptionError
from tests.limits import file_size_limit

WRITER = """
import sys
from pathlib import Path
import mlx.core as mx
from pmetal_distill.checkpoint import TrainingState, list_states, remove_states, write_state
folder = Path(sys.argv[1])
for number in range(1, 1000):
    write_state(folder, number, TrainingState({"a": mx.full((300_000,), number)}, {"number": number}))
    remove_states(list_states(folder)[:-2])
    print(number, flush=True)
"""


def some_state(number: int = 1) -> TrainingState:
    arrays = {
        "w.a": mx.arange(1000, dtype=mx.float32) / 7 + number,
        "w.b": mx.arange(64).astype(mx.bfloat16).reshape(8, 8),
        "step": mx.array(number, mx.uint64),
    }
    return TrainingState(arrays, {"number": number, "mean": 0.1 + 0.2, "text": "é\n\"'", "none": None})


def assert_equal(left: TrainingState, right: TrainingState) -> None:
    assert left.arrays.keys() == right.arrays.keys()
    assert left.record == right.record
    for name, array in left.arrays.items():
        assert array.dtype == right.arrays[name].dtype
        assert mx.array_equal(array, right.arrays[name]), name


class TestFiles:
    def test_a_state_comes_back(self, tmp_path: Path) -> None:
        written = write_state(tmp_path / "c", 12, some_state())
        assert list_states(tmp_path / "c") == [written]
        assert written.path.name.startswith("00000012-")
        assert_equal(written.read(), some_state())

    def test_states_are_listed_in_order_and_nothing_else_is(self, tmp_path: Path) -> None:
        assert list_states(tmp_path / "missing") == []
        files = [write_state(tmp_path, number, some_state(number)) for number in (100000000, 9, 10)]
        (tmp_path / "00000011-0123.safetensors").touch()
        (tmp_path / "notes.txt").touch()
        assert list_states(tmp_path) == [files[1], files[2], files[0]]
        remove_states(files[1:])
        assert list_states(tmp_path) == [files[0]]

    def test_the_same_state_is_the_same_file(self, tmp_path: Path) -> None:
        assert write_state(tmp_path, 3, some_state()) == write_state(tmp_path, 3, some_state())
        assert len(list_states(tmp_path)) == 1

    def test_a_flipped_bit_is_found_wherever_it_is(self, tmp_path: Path) -> None:
        file = write_state(tmp_path, 1, some_state())
        sound = file.path.read_bytes()
        for position in [*range(0, len(sound), 97), len(sound) - 1]:
            damaged = bytearray(sound)
            damaged[position] ^= 1 << position % 8
            file.path.write_bytes(damaged)
            with pytest.raises(CorruptionError, match=r"00000001-.*must have the SHA-256.*remove the file"):
                file.read()

    @pytest.mark.parametrize("keep", [0, 7, 500, -1])
    def test_a_cut_file_is_found(self, tmp_path: Path, keep: int) -> None:
        file = write_state(tmp_path, 1, some_state())
        file.path.write_bytes(file.path.read_bytes()[:keep])
        with pytest.raises(CorruptionError, match="must have the SHA-256"):
            file.read()

    def test_a_missing_file_is_an_error_of_ours(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptionError, match="must be a plain readable file"):
            StateFile(1, tmp_path / "00000001-0123456789abcdef.safetensors").read()

    @pytest.mark.parametrize("limit", [0, 100, 3000, 4300])
    def test_a_full_disk_leaves_what_was_there(self, tmp_path: Path, limit: int) -> None:
        before = write_state(tmp_path, 1, some_state())
        with (
            file_size_limit(limit),
            pytest.raises(CheckpointError, match=r"/00000002: must be written in full.*free space.*--resume"),
        ):
            write_state(tmp_path, 2, some_state(2))
        assert list_states(tmp_path) == [before]
        assert_equal(before.read(), some_state())
        assert not list((tmp_path / "_tmp").iterdir())
        assert_equal(write_state(tmp_path, 2, some_state(2)).read(), some_state(2))

    def test_sigkill_leaves_whole_states_and_the_last_that_was_reported(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for _ in range(3):
            with subprocess.Popen(
                [sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(rng.uniform(0.0, 0.1))
                os.kill(process.pid, signal.SIGKILL)
                reported = process.stdout.read().split()
            files = list_states(tmp_path)
            assert files[-1].number >= int((reported or ["1"])[-1])
            for file in files:
                state = file.read()
                assert state.record["number"] == file.number
                assert state.arrays["a"].min().item() == state.arrays["a"].max().item() == file.number
            remove_states(files)
        write_state(tmp_path, 1, some_state())
        assert not list((tmp_path / "_tmp").iterdir())


OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "adamw": lambda: optim.AdamW(optim.cosine_decay(3e-3, 5)),
    "adam": lambda: optim.Adam(1e-3, bias_correction=True),
    "muon": lambda: optim.Muon(1e-3),
    "sgd": lambda: optim.SGD(1e-2, momentum=0.9),
    "adafactor": lambda: optim.Adafactor(),
}
SCHEDULE = TemperatureSchedule.linear(start=4.0, end=1.0, steps=3)
CASES: dict[str, tuple[str, DistillConfig]] = {
    "adamw": ("adamw", DistillConfig()),
    "adam": ("adam", DistillConfig()),
    "muon": ("muon", DistillConfig()),
    "sgd": ("sgd", DistillConfig()),
    "adafactor": ("adafactor", DistillConfig()),
    "accumulation": ("adamw", DistillConfig(accumulation_steps=3, max_grad_norm=1.0)),
    "schedule": ("adamw", DistillConfig(temperature=SCHEDULE)),
    "taid": ("sgd", DistillConfig(taid=TaidSchedule(), taid_steps=4)),
    "hidden": ("adamw", DistillConfig(hidden_loss=HiddenStateLoss.MSE, hidden_layers=(1,))),
    "compiled": ("adamw", DistillConfig(compiled=True)),
}


def weights(module: nn.Module) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in tree_flatten(module.parameters())}


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> LoadedModel:
    return load_model(tiny_teacher)


class TestDistiller:
    def distiller(self, case: str, teacher: LoadedModel, folder: Path, *, freeze: bool = False) -> Distiller:
        student = load_model(folder)
        if freeze:
            student.model.freeze()
            student.model.layers[1].unfreeze()
        name, config = CASES[case]
        return Distiller(teacher, student, config, optimizer=OPTIMIZERS[name]())

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("freeze", [False, True])
    def test_a_restored_distiller_goes_on_bit_by_bit(
        self, case: str, freeze: bool, teacher: LoadedModel, tiny_student: Path, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(0)
        batches = rng.integers(0, 320, (6, 2, 12)).astype(np.int32)
        straight = self.distiller(case, teacher, tiny_student, freeze=freeze)
        losses = []
        for number, batch in enumerate(batches):
            write_state(tmp_path, number, straight.state)
            losses.append([part.item() for part in straight.step(batch)])
        for number in (0, 2, 4):
            other = self.distiller(case, teacher, tiny_student, freeze=freeze)
            other.state = list_states(tmp_path)[number].read()
            again = [[part.item() for part in other.step(batch)] for batch in batches[number:]]
            assert again == losses[number:]
            assert weights(other.trained) == weights(straight.trained)
            assert_equal(other.state, straight.state)

    def test_dropout_goes_on_with_the_same_random_numbers(
        self, teacher: LoadedModel, tiny_student: Path, tmp_path: Path
    ) -> None:
        batch = np.random.default_rng(0).integers(0, 320, (2, 12)).astype(np.int32)

        def distiller() -> Distiller:
            made = self.distiller("adamw", teacher, tiny_student)
            mlp = made.student.model.layers[0].mlp
            mlp.down_proj = nn.Sequential(nn.Dropout(0.3), mlp.down_proj)
            return made

        mx.random.seed(3)
        straight = distiller()
        straight.step(batch)
        file = write_state(tmp_path, 1, straight.state)
        expected = [straight.step(batch).total.item() for _ in range(2)]
        mx.random.seed(99)
        other = distiller()
        other.state = file.read()
        assert [other.step(batch).total.item() for _ in range(2)] == expected
        other.state = file.read()
        mx.random.seed(99)
        assert other.step(batch).total.item() != expected[0]

    def test_a_state_of_other_parameters_is_refused_and_changes_nothing(
        self, teacher: LoadedModel, tiny_student: Path, tiny_teacher: Path
    ) -> None:
        frozen = self.distiller("adamw", teacher, tiny_student, freeze=True)
        before = weights(frozen.trained)
        full = self.distiller("adamw", teacher, tiny_student)
        with pytest.raises(
            CheckpointError, match=r"trained 'student.*' must be nothing, as in this training"
        ):
            frozen.state = full.state
        with pytest.raises(CheckpointError, match=r"must be .*float32.*found nothing; give the model"):
            full.state = frozen.state
        assert weights(frozen.trained) == before

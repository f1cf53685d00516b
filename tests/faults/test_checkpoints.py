"""Checkpoints with one wrong byte, or that are no files: each is refused, never half read."""

import os
import random
from pathlib import Path

import mlx.core as mx
import pytest

from pmetal_distill.checkpoint import StateFile, TrainingState, list_states, write_state
from schemas.errors import CorruptionError

LONG = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.fixture
def file(tmp_path: Path) -> StateFile:
    """A state of a few arrays."""
    arrays = {f"trained.{n}": mx.arange(40 + n).astype(mx.float32) for n in range(5)}
    arrays["optimizer.step"] = mx.array(7)
    return write_state(
        tmp_path, 3, TrainingState(arrays, {"version": 1, "iteration": 3, "losses": [0.5, 1e-3]})
    )


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=LONG)])
def test_one_wrong_byte_of_a_checkpoint(file: StateFile, count: int) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    draw, data = random.Random(seed), file.path.read_bytes()
    for _ in range(count):
        wrong = bytearray(data)
        wrong[draw.randrange(len(data))] ^= draw.randrange(1, 256)
        file.path.write_bytes(wrong)
        with pytest.raises(CorruptionError, match=file.path.name):
            file.read()
    file.path.write_bytes(data)
    assert file.read().record["iteration"] == 3


@pytest.mark.parametrize("how", ["cut", "emptied", "longer", "folder", "pipe", "link", "another"])
def test_a_checkpoint_that_is_not_what_was_written(file: StateFile, tmp_path: Path, how: str) -> None:
    data = file.path.read_bytes()
    other = write_state(tmp_path / "other", 4, TrainingState({"a": mx.zeros(3)}, {"iteration": 4}))
    file.path.unlink()
    if how == "folder":
        file.path.mkdir()
    elif how == "pipe":
        os.mkfifo(file.path)
    elif how == "link":
        file.path.symlink_to(other.path)
    else:
        file.path.write_bytes(
            {"cut": data[:-1], "emptied": b"", "longer": data + b"\0", "another": other.path.read_bytes()}[
                how
            ]
        )
    with pytest.raises(CorruptionError):
        file.read()
    assert [state.number for state in list_states(tmp_path)] == [3]

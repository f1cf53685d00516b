"""Output folders that appear whole or not at all, and what killed processes leave beside them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pmetal_distill.modelling.folders import new_folder

HOLDING = """
import sys, time
from pathlib import Path
from pmetal_distill.modelling.folders import new_folder
with new_folder(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("x")
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", HOLDING, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_drafts_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    killed, alive = hold(tmp_path / "a"), hold(tmp_path / "b")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / ".mine.part").mkdir()
    assert len(list(tmp_path.glob(".a.*.part"))) == 1
    with new_folder(tmp_path / "c") as draft:
        (draft / "whole").write_text("x")
    assert not list(tmp_path.glob(".a.*.part"))
    assert len(list(tmp_path.glob(".b.*.part"))) == 1
    alive.kill()
    alive.wait()
    with new_folder(tmp_path / "a") as draft:
        (draft / "whole").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "a", "c"]
    for process in (killed, alive):
        assert process.stdout is not None
        process.stdout.close()


def test_a_full_disk_that_mlx_speaks_of_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="could not be written in full"), new_folder(tmp_path / "c"):
        raise RuntimeError("[write] Failed to write 12 bytes")
    assert not list(tmp_path.iterdir())

"""`make gpu`'s script: a line for each check, a file to send, an exit code that says whether all passed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pmetal_distill.device import on_cpu

ROOT = Path(__file__).parents[1]


def run(out: Path, only: str, *more: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--only", only, *more]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_passing_check_is_told_and_written(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu", "updates", "--anyway")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("PASS"))
    assert "1,000 updates of 1e-4 add up" in line
    sent = (tmp_path / "gpu/gpu-report.txt").read_text()
    assert line in sent
    assert "precision " in sent
    assert "1 checks, 0 failed" in done.stdout


def test_a_failing_check_stops_no_other(tmp_path: Path) -> None:
    """`eval` without the students that training makes."""
    done = run(tmp_path / "gpu", "eval,updates", "--anyway")
    assert done.returncode == 1
    starts = [line[:4] for line in done.stdout.splitlines() if line[:4] in ("PASS", "FAIL")]
    assert starts == ["FAIL", "PASS"]
    assert "2 checks, 1 failed: eval" in done.stdout
    assert "--- eval" in (tmp_path / "gpu/gpu-report.txt").read_text()


@pytest.mark.skipif(not on_cpu(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu", "updates")
    assert done.returncode == 1
    assert "MLX must compute on a GPU, found the CPU" in done.stderr

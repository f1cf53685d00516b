"""The demo's whole path with a teacher of each type, as on a GPU: cache, student, training, evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from pipeline import demo
from pipeline.console import Console
from pipeline.demo import DemoOptions, run_demo
from pipeline.settings import CacheSettings
from pmetal_distill.models import load_model, save_model
from schemas.errors import FingerprintError
from tests.tiny import build_tiny_model
from tests.tiny_gguf import build_tiny_gguf

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as folders in three types and as a GGUF file."""
    root = tmp_path_factory.mktemp("teachers")
    whole = build_tiny_model(root / "float32", hidden_size=32, num_layers=6)
    found = {"float32": whole, "gguf": build_tiny_gguf(root / "model.gguf", whole)}
    for name in ("bfloat16", "float16"):
        loaded = load_model(whole)
        weights = {n: a.astype(getattr(mx, name)) for n, a in tree_flatten(loaded.model.parameters())}
        plain: Any = {"tokenizer": loaded.tokenizer, "config": loaded.config, "weights": weights}
        found[name] = save_model(loaded.model, root / name, **plain)
    return found


@pytest.mark.parametrize("place", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "gguf"])
def test_the_demo_works(
    teachers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    monkeypatch.setenv("PMETAL_HOME", str(tmp_path / "home"))
    if place == "gpu":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(demo, "demo_teacher", lambda: teachers[kind])
    settings = demo._cache_settings

    def small(*given: Any) -> CacheSettings:
        return replace(settings(*given), sketch_rank=16, calibration_tokens=512)

    monkeypatch.setattr(demo, "_cache_settings", small)
    options = DemoOptions(
        tmp_path / "demo", num_layers=3, train_tokens=900, eval_tokens=300, iters=12, seq_len=64
    )
    result = run_demo(options, QUIET, overwrite=False)
    assert result["after"]["kl@2"] < result["before"]["kl@2"]
    own = {"gguf": "bfloat16" if place == "gpu" else "float32"}.get(kind, kind)
    expected = {"name": "mixed" if own != "float32" else "float32", "stored": own}
    assert {name: result["train"]["precision"][name] for name in expected} == expected
    saved = mx.load(str(Path(result["train"]["model"]) / "model.safetensors"))
    assert {str(a.dtype).rpartition(".")[2] for a in saved.values()} == {own}  # type: ignore[union-attr]
    meta = json.loads((tmp_path / "demo/cache/dataset.json").read_text())["meta"]
    computes = "float32" if place == "cpu" else ("bfloat16" if own == "float32" else own)
    assert meta["teacher_dtype"] == computes


def test_a_cache_is_not_completed_in_another_type(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Half of its shards would be of a teacher that rounds otherwise."""
    from benchmarks.letters import write_letters
    from pipeline.cache import run_cache

    text = tmp_path / "text.jsonl"
    write_letters(text, documents=8, characters=200)
    given: dict[str, Any] = {
        "teacher": str(teachers["float32"]),
        "data": str(text),
        "out": tmp_path / "cache",
    }
    given |= {"tail": "bucket", "max_seq_len": 64, "sequences_per_shard": 4}
    run_cache(CacheSettings(**given), QUIET)
    next((tmp_path / "cache/commits").iterdir()).unlink()
    with pytest.raises(FingerprintError, match=r"dtype: must be float32.*found bfloat16.*--dtype float32"):
        run_cache(CacheSettings(**given, dtype="bfloat16", resume=True), QUIET)
    run_cache(CacheSettings(**given, dtype="float32", resume=True), QUIET)

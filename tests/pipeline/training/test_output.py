"""What a run leaves: mlx-lm reads it, generates with it, and fuses it to the same bytes."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from pipeline.console import Console
from pipeline.settings import LoraParameters, TrainSettings
from pipeline.training.output import write_outputs
from pipeline.training.student import prepare_student
from pmetal_distill.adapters import adapter_weights
from pmetal_distill.models import LoadedModel, load_model, save_model
from tests.tiny import random_model, tiny_config

SOURCE = SimpleNamespace(describe=lambda: {"teacher": "some/teacher", "data": "text.jsonl"})
METRICS = {"iteration": 10, "loss": 1.25}
IDS = mx.array([[5, 99, 3, 250, 17, 8, 61, 2]])


def settings(student: Path | str, out: Path, **changes: Any) -> TrainSettings:
    values = {"student": str(student), "cache": out, "out": out} | changes
    return TrainSettings(**values)


def trained(run: TrainSettings, size: float = 0.05) -> LoadedModel:
    """A student as training leaves it: its trainable weights moved a little."""
    student = prepare_student(run, Console(quiet=True))
    rng = np.random.default_rng(0)
    moved = [
        (n, w + size * mx.array(rng.normal(size=w.shape))) for n, w in adapter_weights(student.model).items()
    ]
    student.model.load_weights([(n, w.astype(mx.float32)) for n, w in moved], strict=False)
    run.out.mkdir()
    return student


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(IDS))


def by_mlx_lm(folder: Path | str, **options: Any) -> np.ndarray:
    from mlx_lm import load

    return logits(load(str(folder), **options)[0])


def mlx_lm(*words: object) -> str:
    command = [sys.executable, "-m", "mlx_lm", *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def quantized(tiny_student: Path, tmp_path: Path) -> Path:
    config = tiny_config(num_layers=2)
    model = random_model(config)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"group_size": 32, "bits": 4}
    tokenizer = load_model(tiny_student).tokenizer
    return save_model(model, tmp_path / "quantized", tokenizer=tokenizer, config=config)


class TestFull:
    def test_a_model_folder(self, tiny_student: Path, tmp_path: Path) -> None:
        run = settings(tiny_student, tmp_path / "run")
        student = trained(run)
        assert write_outputs(run, student, SOURCE, METRICS) == {
            "model": str(run.out / "model"),
            "card": str(run.out / "README.md"),
        }
        np.testing.assert_array_equal(by_mlx_lm(run.out / "model"), logits(student.model))
        assert sorted(path.name for path in run.out.iterdir()) == ["README.md", "model"]

    def test_writing_again_replaces(self, tiny_student: Path, tmp_path: Path) -> None:
        run = settings(tiny_student, tmp_path / "run")
        student = trained(run)
        write_outputs(run, student, SOURCE, METRICS)
        (run.out / ".model.new").mkdir()
        student.model.load_weights([("model.norm.weight", mx.zeros(32))], strict=False)
        write_outputs(run, student, SOURCE, METRICS)
        assert not by_mlx_lm(run.out / "model").any()
        assert sorted(path.name for path in run.out.iterdir()) == ["README.md", "model"]


class TestAdapters:
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_mlx_lm_loads_and_fuses_them(self, kind: str, tiny_student: Path, tmp_path: Path) -> None:
        run = settings(
            tiny_student, tmp_path / "run", fine_tune_type=kind, num_layers=1, fuse=True,
            lora_parameters=LoraParameters(rank=4, scale=5.0),
        )  # fmt: skip
        student = trained(run)
        written = write_outputs(run, student, SOURCE, METRICS)
        assert written["adapters"] == str(run.out)
        expected = logits(student.model)
        assert np.abs(expected - by_mlx_lm(tiny_student)).max() > 0.1
        np.testing.assert_array_equal(by_mlx_lm(tiny_student, adapter_path=str(run.out)), expected)
        np.testing.assert_allclose(by_mlx_lm(written["model"]), expected, atol=1e-4)
        np.testing.assert_array_equal(logits(student.model), expected)

    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_quantized_students_are_fused_as_mlx_lm_fuses_them(
        self, kind: str, quantized: Path, tmp_path: Path
    ) -> None:
        run = settings(quantized, tmp_path / "run", fine_tune_type=kind, fuse=True)
        student = trained(run, 0.02)
        written = write_outputs(run, student, SOURCE, METRICS)
        np.testing.assert_array_equal(by_mlx_lm(quantized, adapter_path=str(run.out)), logits(student.model))
        mlx_lm("fuse", "--model", quantized, "--adapter-path", run.out, "--save-path", tmp_path / "fused")
        # Another process may use another BLAS.
        np.testing.assert_allclose(by_mlx_lm(written["model"]), by_mlx_lm(tmp_path / "fused"), atol=1e-4)
        ours, theirs = (
            mx.load(str(Path(f) / "model.safetensors")) for f in (written["model"], tmp_path / "fused")
        )
        assert ours.keys() == theirs.keys()  # type: ignore[union-attr]

    def test_mlx_lm_generates_with_them(self, tiny_student: Path, tmp_path: Path) -> None:
        run = settings(tiny_student, tmp_path / "run", fine_tune_type="lora")
        write_outputs(run, trained(run), SOURCE, METRICS)
        words = ("--prompt", "The fox", "--max-tokens", 4, "--temp", 0)
        said = mlx_lm("generate", "--model", tiny_student, "--adapter-path", run.out, *words)
        assert "4 tokens" in said
        assert (
            said.split("==========")[1]
            != mlx_lm("generate", "--model", tiny_student, *words).split("==========")[1]
        )

    def test_the_configuration_speaks_of_the_run(self, tiny_student: Path, tmp_path: Path) -> None:
        run = settings(
            tiny_student, tmp_path / "run", fine_tune_type="lora", num_layers=2, iters=70, learning_rate=3e-4,
            lora_parameters=LoraParameters(keys=("self_attn.q_proj",)),
        )  # fmt: skip
        write_outputs(run, trained(run), SOURCE, METRICS)
        config = json.loads((run.out / "adapter_config.json").read_text())
        assert config["lora_parameters"] == {
            "rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"],
        }  # fmt: skip
        from mlx_lm.lora import CONFIG_DEFAULTS

        own = {"model": str(tiny_student), "num_layers": 2, "iters": 70, "learning_rate": 3e-4, "train": True}
        assert config.items() >= own.items()
        assert config.keys() <= CONFIG_DEFAULTS.keys() | {"adapter_path"}

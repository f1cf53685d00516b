"""The student of a run: which of its weights are trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pipeline.console import Console
from pipeline.settings import LoraParameters, TrainSettings
from pipeline.training.student import prepare_student
from pmetal_distill.adapters import AdapterSpec, adapter_weights, add_adapters, save_adapters
from pmetal_distill.models import LoadedModel, load_model, save_model
from schemas.errors import ModelError, UsageError
from tests.tiny import random_model, tiny_config

QUIET = Console(quiet=True)
Prepare = Callable[..., LoadedModel]


@pytest.fixture
def prepare(tiny_student: Path, tmp_path: Path) -> Prepare:
    """The tiny student of 2 layers under some settings."""

    def prepared(console: Console = QUIET, **changes: Any) -> LoadedModel:
        values = {"student": str(tiny_student), "cache": tmp_path, "out": tmp_path / "run"} | changes
        return prepare_student(TrainSettings(**values), console)

    return prepared


@pytest.fixture
def quantized(tiny_student: Path, tmp_path: Path) -> str:
    """A student of 4 bits."""
    config = tiny_config(num_layers=2)
    model = random_model(config)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"group_size": 32, "bits": 4}
    tokenizer = load_model(tiny_student).tokenizer
    return str(save_model(model, tmp_path / "quantized", tokenizer=tokenizer, config=config))


def trained(student: LoadedModel) -> set[str]:
    return set(adapter_weights(student.model))


class TestPrepareStudent:
    def test_full_trains_every_weight(self, prepare: Prepare) -> None:
        student = prepare()
        assert trained(student) == {name for name, _ in tree_flatten(student.model.parameters())}
        assert "model.embed_tokens.weight" in trained(student)

    def test_full_of_some_blocks(self, prepare: Prepare) -> None:
        names = trained(prepare(num_layers=1))
        assert names
        assert all(name.startswith("model.layers.1.") for name in names)

    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_adapters(self, prepare: Prepare, kind: str) -> None:
        wanted = LoraParameters(rank=5, scale=3.0, keys=("mlp.up_proj",))
        student = prepare(fine_tune_type=kind, lora_parameters=wanted)
        leaves = ["lora_a", "lora_b"] + (["m"] if kind == "dora" else [])
        assert trained(student) == {f"model.layers.{n}.mlp.up_proj.{leaf}" for n in (0, 1) for leaf in leaves}
        layer: Any = student.model.layers[0].mlp.up_proj
        assert (layer.lora_a.shape, layer.scale) == ((32, 5), 3.0)
        assert len(trained(prepare(fine_tune_type=kind, num_layers=1))) == 7 * len(leaves)

    def test_the_seed_decides_the_adapters(self, prepare: Prepare) -> None:
        a, b, c = (adapter_weights(prepare(fine_tune_type="lora", seed=seed).model) for seed in (0, 0, 1))
        name = "model.layers.0.mlp.up_proj.lora_a"
        np.testing.assert_array_equal(np.array(a[name]), np.array(b[name]))
        assert not np.array_equal(np.array(a[name]), np.array(c[name]))

    def test_quantized_students_take_adapters_only(self, prepare: Prepare, quantized: str) -> None:
        assert trained(prepare(student=quantized, fine_tune_type="lora"))
        for num_layers in (-1, 1):
            with pytest.raises(UsageError, match="must not be quantized"):
                prepare(student=quantized, num_layers=num_layers)

    def test_going_on_from_adapters(
        self, prepare: Prepare, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        spec = AdapterSpec(num_layers=1)
        first = add_adapters(load_model(tiny_student), spec, seed=5)
        save_adapters(first.model, tmp_path, spec.config())
        file = tmp_path / "adapters.safetensors"
        student = prepare(Console(), fine_tune_type="lora", resume_adapter_file=file)
        expected = adapter_weights(first.model)
        for name, value in expected.items():
            np.testing.assert_array_equal(np.array(adapter_weights(student.model)[name]), np.array(value))
        assert "holds 14 of the 28 trained tensors; the others start new" in capsys.readouterr().err
        with pytest.raises(UsageError, match="must be dora adapters"):
            prepare(fine_tune_type="dora", resume_adapter_file=file)

    def test_gradient_checkpointing_is_the_students_alone(self, prepare: Prepare, tiny_student: Path) -> None:
        student = prepare(fine_tune_type="lora", grad_checkpoint=True)
        other = load_model(tiny_student)
        assert all(isinstance(block.dropout_keys, object) for block in student.model.layers)
        assert not any(hasattr(block, "dropout_keys") for block in other.model.layers)

    def test_notes_about_the_model_are_told(
        self, prepare: Prepare, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = tiny_config(
            model_type="mamba",
            **{
                "state_size": 8,
                "conv_kernel": 4,
                "use_bias": True,
                "use_conv_bias": True,
                "time_step_rank": 4,
            },
        )
        tokenizer = load_model(tiny_student).tokenizer
        folder = save_model(random_model(config), tmp_path / "mamba", tokenizer=tokenizer, config=config)
        prepare(Console(), student=str(folder))
        assert "student: several documents in one sequence cannot be kept apart" in capsys.readouterr().err

    def test_a_missing_student(self, prepare: Prepare, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such file or folder"):
            prepare(student=str(tmp_path / "missing" / "student" / "model"))

"""Gradient checkpointing: the same gradients, dropout and steps, and less memory."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill.adapters import AdapterSpec, add_adapters
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.modelling.recompute import recompute_blocks
from pmetal_distill.models import LoadedModel, load_model
from tests.pmetal_distill.adapter_cases import in_memory, some_text, stir
from tests.tiny import random_model, tiny_config


@pytest.fixture
def teacher(tiny_teacher: Path) -> LoadedModel:
    return load_model(tiny_teacher)


def gradients(model: nn.Module, *, seed: int = 0) -> tuple[float, dict[str, np.ndarray]]:
    ids = mx.array(some_text().token_ids)
    mx.random.seed(seed)
    value, slopes = nn.value_and_grad(model, lambda: mx.square(model(ids)).mean())()
    return value.item(), {name: np.array(slope) for name, slope in tree_flatten(slopes)}


class TestRecomputing:
    @pytest.mark.parametrize(
        "prepare",
        [
            lambda student: student,
            lambda student: add_adapters(student, AdapterSpec("lora", num_layers=2), seed=0),
            lambda student: add_adapters(student, AdapterSpec("dora"), seed=0),
        ],
    )
    def test_gradients_are_the_same(self, prepare: Callable[[LoadedModel], LoadedModel]) -> None:
        results = []
        for recompute in (False, True):
            model = prepare(in_memory()).model
            stir(model)
            model.train()
            if recompute:
                recompute_blocks(model.layers)
            results.append(gradients(model))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
        assert results[0][1].keys() == results[1][1].keys()
        for name, slope in results[0][1].items():
            np.testing.assert_allclose(
                results[1][1][name], slope, atol=1e-5 * np.abs(slope).max(), err_msg=name
            )

    def test_dropout_is_the_same_in_both_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = add_adapters(in_memory(), AdapterSpec(dropout=0.5), seed=0).model
        stir(model)
        recompute_blocks(model.layers)
        model.train()
        value, slopes = gradients(model, seed=1)
        assert value != pytest.approx(gradients(model, seed=2)[0], rel=1e-3)
        monkeypatch.setattr(mx, "checkpoint", lambda run: run)  # the same draws, used once
        monkeypatch.setattr("pmetal_distill.modelling.recompute._without_graph", lambda output: output)
        expected_value, expected = gradients(model, seed=1)
        assert value == expected_value
        for name, slope in expected.items():
            np.testing.assert_allclose(slopes[name], slope, atol=1e-5 * np.abs(slope).max(), err_msg=name)

    def test_other_models_of_the_class_are_left_alone(self) -> None:
        one, two = in_memory().model, in_memory().model
        recompute_blocks(one.layers)
        recompute_blocks(one.layers)
        assert type(two.layers[0]) is not type(one.layers[0]) is type(one.layers[1])
        assert type(one.layers[0]).__name__ == "TransformerBlock"
        assert type(one.layers[0]).__mro__[1] is type(two.layers[0])

    def test_less_memory(self) -> None:
        ids = mx.array(some_text(4, 128).token_ids)
        peaks = []
        for recompute in (False, True):
            model = random_model(tiny_config(num_layers=24, intermediate_size=512))
            model.train()
            if recompute:
                recompute_blocks(model.layers)
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            mx.eval(nn.value_and_grad(model, lambda: mx.square(model(ids)).mean())())  # noqa: B023
            peaks.append(mx.get_peak_memory() - before)
        assert peaks[1] < 0.4 * peaks[0]

    @pytest.mark.parametrize("compiled", [False, True])
    def test_steps_take_less_memory(self, teacher: LoadedModel, compiled: bool) -> None:
        text, peaks = some_text(4, 128), []
        for recompute in (False, True):
            student = in_memory(num_layers=24, intermediate_size=512)
            if recompute:
                recompute_blocks(student.model.layers)
            distiller = Distiller(teacher, student, DistillConfig(compiled=compiled))
            distiller.step(text)
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            distiller.step(text)
            peaks.append(mx.get_peak_memory() - before)
        assert peaks[1] < 0.5 * peaks[0]

    @pytest.mark.parametrize("compiled", [False, True])
    def test_steps_are_the_same(self, teacher: LoadedModel, compiled: bool) -> None:
        losses = []
        for recompute in (False, True):
            student = add_adapters(in_memory(), AdapterSpec(scale=4.0), seed=0)
            if recompute:
                recompute_blocks(student.model.layers)
            config = DistillConfig(compiled=compiled, accumulation_steps=2)
            distiller = Distiller(teacher, student, config, optimizer=optim.Adam(learning_rate=5e-3))
            losses.append([distiller.step(some_text()).total.item() for _ in range(5)])
        assert losses[0][-1] < losses[0][0]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

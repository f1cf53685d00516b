"""Validation: its figures against dense float64, and a training that does not notice it."""

from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pipeline.settings import TrainSettings
from pipeline.training.config import distill_config
from pipeline.training.optimizing import build_optimizer
from pipeline.training.source import open_source
from pipeline.training.validation import Validator
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import load_model
from pmetal_distill.schedule import AlphaSchedule, TemperatureSchedule
from tests.pipeline.training.sources import QUIET, make_cache, offline, online
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_teacher, text_file, tmp_path_factory.mktemp("validation") / "cache")


def validator(settings: TrainSettings) -> Validator:
    student = load_model(settings.student)
    source = open_source(settings, student, QUIET)
    config = distill_config(settings, source.hidden_layers)
    distiller = Distiller(source.teacher, student, config, optimizer=build_optimizer(settings))
    return Validator(settings, source, distiller)


def log_softmax(logits: Any) -> np.ndarray:
    x = np.array(logits, np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_figures_are_those_of_all_logits_in_float64(
    tiny_teacher: Path, tiny_student: Path, text_file: Path
) -> None:
    settings = online(
        tiny_teacher,
        text_file,
        tiny_student,
        val_share=0.2,
        val_batches=3,
        temperature=3.0,
        alpha=0.25,
        loss="reverse_kl",
    )
    checked = validator(settings)
    found = checked.run()
    teacher, student = load_model(tiny_teacher), load_model(tiny_student)
    kl: dict[float, list[float]] = {1.0: [], 2.0: [], 3.0: []}
    agree, nll = [], []
    for batch in checked.source.validation_batches(settings.batch_size, 3):
        mask, ids = batch.loss_mask, mx.array(batch.token_ids)
        p, q = (model.full(ids, documents=batch.documents) for model in (teacher, student))
        p, q = np.array(p, np.float64)[mask], np.array(q, np.float64)[mask]
        for t in kl:
            lp, lq = log_softmax(p / t), log_softmax(q / t)
            lp, lq = (lq, lp) if t == 3.0 else (lp, lq)
            kl[t] += (np.exp(lp) * (lp - lq)).sum(-1).tolist()
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
        labels = batch.labels[mask]
        nll += (-log_softmax(q)[np.arange(len(q)), labels])[labels >= 0].tolist()
    assert len(nll) < len(agree)
    soft, hard = np.mean(kl[3.0]), np.mean(nll)
    expected = {
        "val_loss": 0.25 * 9 * soft + 0.75 * hard,
        "val_kl@1": np.mean(kl[1.0]),
        "val_kl@2": np.mean(kl[2.0]),
        "val_soft": soft,
        "val_top1": np.mean(agree),
        "val_hard": hard,
        "val_perplexity": np.exp(hard),
    }
    assert found == pytest.approx(expected, rel=2e-5)


def test_the_loss_is_the_one_that_the_schedules_end_with(cache: Path, tiny_student: Path) -> None:
    ramps = {
        "temperature": TemperatureSchedule.linear(start=4.0, end=1.0, steps=4),
        "alpha": AlphaSchedule.linear(start=0.0, end=1.0, steps=4),
        "iters": 10,
    }
    found = validator(offline(cache, tiny_student, val_share=0.2, **ramps)).run()
    assert found["val_soft"] == found["val_kl@1"] == pytest.approx(found["val_loss"])


@pytest.mark.parametrize(("every", "due"), [(0, []), (4, [4, 8])])
def test_when_it_is_due(every: int, due: list[int], cache: Path, tiny_student: Path) -> None:
    checked = validator(offline(cache, tiny_student, val_share=0.2, steps_per_eval=every))
    assert [n for n in range(1, 10) if checked.due(n)] == due


def test_nothing_held_out_is_nothing_to_do(cache: Path, tiny_student: Path) -> None:
    checked = validator(offline(cache, tiny_student, steps_per_eval=1))
    assert not checked.due(1)
    assert checked.run() == {}


@pytest.mark.parametrize("kind", ["cache", "live"])
def test_training_does_not_notice(
    kind: str, cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    """With dropout, so that a draw of random numbers or a wrong mode would show in the weights."""
    student = build_tiny_model(tmp_path / "student", num_layers=2, seed=1)
    options: dict[str, Any] = {"val_share": 0.2, "steps_per_eval": 2, "learning_rate": 1e-2}
    runs = []
    for validate in (False, True):
        if kind == "cache":
            settings = offline(cache, student, **options)
        else:
            settings = online(tiny_teacher, text_file, student, **options)
        checked = validator(settings)
        mx.random.seed(5)
        _add_dropout(checked.distiller)
        values: list[dict[str, float]] = []
        with checked.source.batches(batch_size=4, seed=0) as batches:
            for iteration, batch in enumerate(islice(batches, 6), start=1):
                checked.distiller.step(batch)
                if validate and checked.due(iteration):
                    values.append(checked.run())
            state = batches.get_state()
        weights = dict(tree_flatten(checked.distiller.trained.parameters()))
        runs.append((weights, state, np.array(mx.random.state[0]), checked.distiller.trained.training))
    assert len(values) == 3
    assert values[-1]["val_loss"] != values[0]["val_loss"]
    (plain, *rest), (watched, *rest_watched) = runs
    for name, value in plain.items():
        np.testing.assert_array_equal(np.array(value), np.array(watched[name]), err_msg=name)
    assert rest[0] == rest_watched[0]
    np.testing.assert_array_equal(rest[1], rest_watched[1])
    assert rest[2] == rest_watched[2]


def _add_dropout(distiller: Distiller) -> None:
    """LoRA layers with dropout on the student's attention, as mlx-lm makes them."""
    from mlx_lm.tuner.lora import LoRALinear

    for layer in distiller.student.model.layers:
        attention = layer.self_attn
        attention.q_proj = LoRALinear.from_base(attention.q_proj, r=2, dropout=0.5)
        attention.q_proj.lora_b = mx.ones_like(attention.q_proj.lora_b)


def test_the_mode_of_the_model_is_restored(cache: Path, tiny_student: Path) -> None:
    checked = validator(offline(cache, tiny_student, val_share=0.2))
    for mode in (True, False):
        checked.distiller.trained.train(mode)
        checked.run()
        assert checked.distiller.trained.training is mode

"""Students whose head is no matrix that could be found: the same training, through the model's own logits."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.evaluation.targets import Question, target_rows
from pmetal_distill.losses.chunked_head import Backend, HeadOptions, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.losses.hidden import HiddenStateLoss
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.models import LoadedModel, wrap_model
from pmetal_distill.precision import float_types
from pmetal_distill.teaching import LiveTeacher, TextBatch
from schemas.errors import ModelError
from tests.pmetal_distill.head_cases import BACKENDS
from tests.pmetal_distill.loss_cases import make_case
from tests.tiny import random_model, tiny_config
from tests.zoo import made, some_tokens

BATCH = TextBatch.of(np.random.default_rng(0).integers(0, 320, (3, 12)).astype(np.int32))
PACKED = replace(BATCH, documents=np.array([[0] * 5 + [1] * 7] * 3, np.int32))


def hidden_from_us(loaded: LoadedModel, *parts: str) -> LoadedModel:
    """The same model, of which some parts were not found."""
    return replace(loaded, anatomy=replace(loaded.anatomy, **dict.fromkeys(parts)))


def student_of(seed: int, *, half: bool = False) -> LoadedModel:
    config = tiny_config(num_layers=2, tie=False)
    model = random_model(config, seed=seed)
    types = dict.fromkeys(float_types(model), mx.bfloat16) if half else None
    return wrap_model(model, None, config, stored=types)


def trained(student: LoadedModel, config: DistillConfig, batch: TextBatch) -> tuple[list[float], Any]:
    distiller = Distiller(made("llama"), student, config, optimizer=optim.SGD(learning_rate=1e-2))
    losses = [distiller.step(batch).total.item() for _ in range(3)]
    return losses, dict(tree_flatten(student.model.parameters()))


CONFIGS = {
    "plain": DistillConfig(temperature=2.0, alpha=0.5, chunk_tokens=5),
    "taid": DistillConfig(temperature=2.0, taid=TaidSchedule(), taid_steps=4),
    "compiled": DistillConfig(temperature=2.0, compiled=True),
    "hidden": DistillConfig(hidden_loss=HiddenStateLoss.MSE, hidden_layers=[1], hidden_weight=1.0),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [BATCH, PACKED], ids=["alone", "packed"])
def test_training_is_that_of_the_head_as_a_matrix(name: str, batch: TextBatch) -> None:
    parts = ["head"] if name == "hidden" else ["head", "body", "blocks"]
    losses, weights = trained(student_of(1), CONFIGS[name], batch)
    found, moved = trained(hidden_from_us(student_of(1), *parts), CONFIGS[name], batch)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    assert weights.keys() == moved.keys()
    for key, expected in weights.items():
        np.testing.assert_allclose(np.array(moved[key]), np.array(expected), atol=2e-4, err_msg=key)


def test_products_are_made_in_the_compute_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmetal_distill.precision.on_cpu", lambda: False)
    student = hidden_from_us(student_of(1, half=True), "head", "body", "blocks")
    distiller = Distiller(made("llama"), student, DistillConfig(precision="mixed"))
    states, _ = distiller._computing().scored(some_tokens(1, 6))
    assert states.final.dtype == mx.bfloat16
    assert distiller.step(BATCH).total.item() == pytest.approx(
        Distiller(made("llama"), student_of(1), DistillConfig()).step(BATCH).total.item(), rel=0.05
    )
    assert {a.dtype for _, a in tree_flatten(student.model.parameters())} == {mx.float32}


@pytest.mark.parametrize("name", ["gpt_neox", "phixtral", "lille-130m"])
def test_architectures_that_need_it(name: str) -> None:
    student = made(name)
    assert student.head is None
    losses, _ = trained(student, DistillConfig(temperature=2.0), BATCH)
    assert losses[2] < losses[0]
    teacher, question = LiveTeacher(made("llama"), 320), Question(Divergence(), 1.0)
    rows = target_rows(student, teacher, BATCH, [question])
    logits = student.model(mx.array(BATCH.token_ids)).reshape(-1, 320)
    target = teacher.answer(BATCH, ())[0]
    expected = divergence_loss(logits, target, divergence=Divergence(), temperature=1.0)
    counts = BATCH.loss_mask.reshape(-1)
    np.testing.assert_allclose(np.array(rows.soft[0])[counts], np.array(expected)[counts], rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_student_that_does_not_pack_learns_from_packed_text(compiled: bool) -> None:
    """As from the same documents in sequences of their own, padded."""
    apart = TextBatch(
        *(np.zeros((6, 7), np.int32), np.full((6, 7), -1, np.int32), np.zeros((6, 7), bool)),
        np.full((6, 7), -100, np.int32),
    )
    labels = np.where(PACKED.documents == np.roll(PACKED.documents, -1, 1), PACKED.labels, -100)
    labels[:, -1] = -100
    packed = replace(PACKED, labels=labels, loss_mask=labels >= 0)
    for row in range(3):
        for number, where in enumerate((slice(0, 5), slice(5, 12))):
            target = (2 * row + number, slice(0, where.stop - where.start))
            apart.documents[target] = 0
            apart.token_ids[target] = packed.token_ids[row, where]
            apart.loss_mask[target] = packed.loss_mask[row, where]
            apart.labels[target] = labels[row, where]
    config = DistillConfig(temperature=2.0, compiled=compiled)
    losses, found = [], []
    for batch, into in ((apart, losses), (packed, found)):
        student = wrap_model(random_model(made("mamba").config), None, made("mamba").config)
        into += trained(student, config, batch)[0]
    np.testing.assert_allclose(found, losses, rtol=1e-4)


def test_hidden_states_that_a_student_does_not_give() -> None:
    student = hidden_from_us(student_of(1), "head", "body", "blocks")
    with pytest.raises(ModelError, match="must give the outputs of its blocks"):
        Distiller(made("llama"), student, CONFIGS["hidden"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [50, 47])
def test_logits_in_the_place_of_states(backend: Backend, vocab: int) -> None:
    """Also those of a student with more tokens than the target."""
    case = make_case("bucket", Divergence(), vocab=vocab, k=7, num_tokens=8)
    logits = mx.random.normal((8, 50), key=mx.random.key(3))
    labels, mask = mx.array(case.labels), mx.array(case.mask)
    options = HeadOptions(backend=backend, chunk_tokens=3)

    def chunked(rows: mx.array) -> mx.array:
        return head_loss(
            rows, HeadParts.of_logits(50), case.target.at(2.0), labels, mask, options=options
        ).total

    def direct(rows: mx.array) -> mx.array:
        rows = rows[:, :vocab]
        soft = divergence_loss(rows, case.target, divergence=case.divergence, temperature=2.0)
        counted = mx.where(mask > 0, labels, -100)
        hard = hard_cross_entropy(rows, counted).sum() / (counted != -100).sum()
        return 0.5 * 4 * (soft * mask).sum() / mask.sum() + 0.5 * hard

    np.testing.assert_allclose(chunked(logits).item(), direct(logits).item(), rtol=1e-5)
    np.testing.assert_allclose(
        np.array(mx.grad(chunked)(logits)), np.array(mx.grad(direct)(logits)), atol=1e-6
    )

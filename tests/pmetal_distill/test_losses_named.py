"""The crate's names for the losses: values, gradients, masks and labels, and the config that takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import yaml

from pmetal_distill import (
    DistillConfig,
    Distiller,
    JensenShannonLoss,
    KLDivergenceLoss,
    SoftCrossEntropyLoss,
    load_model,
)
from pmetal_distill.losses import HeadParts, NamedLoss, functional, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.offline import CachedTeacher, LogitCache
from pmetal_distill.target import TeacherTarget
from pmetal_distill.teaching import TextBatch
from schemas.errors import IncompatibleError, UsageError
from tests.pmetal_distill.loss_cases import make_case
from tests.pmetal_distill.offline.caches import make_dataset, write_cache

LOSSES: list[tuple[NamedLoss, Callable[..., mx.array]]] = [
    (KLDivergenceLoss(), functional.forward_kl),
    (KLDivergenceLoss(reverse=True), functional.reverse_kl),
    (
        JensenShannonLoss(beta=0.3),
        lambda s, t, *, temperature: functional.jensen_shannon(s, t, temperature=temperature, beta=0.3),
    ),
    (SoftCrossEntropyLoss(), functional.soft_cross_entropy),
]
EACH = pytest.mark.parametrize(("loss", "function"), LOSSES, ids=lambda value: repr(value)[:20])


def logits_of(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3)


@EACH
@pytest.mark.parametrize("kind", ["dense", "bucket", "sketch"])
def test_it_is_the_masked_mean_of_the_functional_loss(
    loss: NamedLoss, function: Callable[..., mx.array], kind: Any
) -> None:
    case = make_case(kind, Divergence("forward_kl"), vocab=50, k=5, num_tokens=6)
    student, mask = mx.array(case.student).reshape(2, 3, 50), mx.array([[1, 0, 1], [0, 1, 1]])
    rows = np.array(function(student, case.target, temperature=3.0))
    expected = 9 * rows[np.array(mask) > 0].mean()
    assert loss(student, case.target, temperature=3.0, mask=mask).item() == pytest.approx(expected, rel=1e-5)
    assert loss(student, case.target, temperature=3.0).item() == pytest.approx(9 * rows.mean(), rel=1e-5)


@EACH
def test_dense_teacher_logits_are_a_dense_target(loss: NamedLoss, function: Any) -> None:
    student, teacher = logits_of((2, 3, 40), 0), logits_of((2, 3, 40), 1)
    found = loss(student, teacher, temperature=2.0)
    assert found.shape == ()
    assert found.item() == loss(student, TeacherTarget.dense(teacher), temperature=2.0).item()
    moved = mx.grad(lambda t: loss(student, t, temperature=2.0))(teacher)
    assert mx.abs(moved).max().item() == 0.0  # the teacher is not trained


@EACH
def test_with_labels_it_is_the_loss_that_a_distiller_trains_on(loss: NamedLoss, function: Any) -> None:
    case = make_case("sketch", loss.divergence, vocab=30, k=5, num_tokens=12, temperature=2.0)
    hidden, weight = logits_of((12, 8), 2), logits_of((30, 8), 3)
    labels, mask = mx.array(case.labels), mx.array(case.mask)
    assert 0 < (case.labels[case.mask > 0] >= 0).sum() < (case.mask > 0).sum()
    trained = head_loss(
        hidden, HeadParts(weight), case.target.at(2.0), labels, mask, divergence=loss.divergence, alpha=0.7
    )
    found = loss(hidden @ weight.T, case.target, temperature=2.0, mask=mask, labels=labels, alpha=0.7)
    assert found.item() == pytest.approx(trained.total.item(), rel=1e-4)


@EACH
@pytest.mark.parametrize("kind", ["dense", "sketch"])
def test_its_gradient_equals_finite_differences_of_itself(loss: NamedLoss, function: Any, kind: Any) -> None:
    case = make_case(kind, loss.divergence, vocab=11, k=4, num_tokens=4)
    labels, mask = mx.array([3, -100, 7, 1]), mx.array([1.0, 1.0, 0.0, 0.5])
    rng = np.random.default_rng(5)

    def value(student: mx.array) -> mx.array:
        return loss(student, case.target, temperature=1.5, mask=mask, labels=labels, alpha=0.6)

    student = mx.array(case.student)
    gradient = mx.grad(value)(student)
    assert mx.abs(gradient[2]).max().item() == 0.0  # masked
    for _ in range(8):
        direction = mx.array(rng.standard_normal(student.shape).astype(np.float32))
        slope = (value(student + 1e-2 * direction) - value(student - 1e-2 * direction)).item() / 2e-2
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=5e-3, abs=2e-3)


def test_a_nan_where_nothing_counts_reaches_nothing() -> None:
    student, teacher = logits_of((2, 9), 0), logits_of((2, 9), 1)
    student[1, 3], teacher[1, 4] = float("nan"), float("inf")
    mask, labels = mx.array([True, False]), mx.array([2, 3])
    value, slope = mx.value_and_grad(
        lambda s: KLDivergenceLoss()(s, teacher, temperature=2.0, mask=mask, labels=labels)
    )(student)
    assert mx.isfinite(value).item()
    assert mx.isfinite(slope).all().item()
    assert KLDivergenceLoss()(student, teacher, mask=mx.array([False, False])).item() == 0.0


def test_a_batch_of_a_cache_is_a_target(tmp_path: Path) -> None:
    dataset = make_dataset(num_sequences=4, per_shard=2)
    cache = LogitCache(write_cache(tmp_path / "cache", dataset))
    teacher = CachedTeacher(cache)
    with cache.batches(batch_size=2, seed=0, epochs=1) as batches:
        batch = next(batches)
    student = logits_of((*batch.token_ids.shape, dataset.target.vocab_size), 4)
    target, mask = teacher.target(batch), mx.array(batch.loss_mask)
    rows = np.array(functional.forward_kl(student, target, temperature=2.0))
    expected = 4 * rows[batch.loss_mask].mean()
    found = KLDivergenceLoss()(student, target, temperature=2.0, mask=mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_defaults_are_those_of_the_config() -> None:
    student, teacher, labels = logits_of((3, 9), 0), logits_of((3, 9), 1), mx.array([1, 2, 3])
    config, loss = DistillConfig(), KLDivergenceLoss()
    explicit = loss(student, teacher, temperature=config.temperature, labels=labels, alpha=config.alpha)  # type: ignore[arg-type]
    assert loss(student, teacher, labels=labels).item() == explicit.item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.5}, "needs labels; pass labels="),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, found 1.5"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"mask": mx.ones((3, 9))}, r"mask must have one entry .*\(3,\), found \(3, 9\)"),
        ({"labels": mx.zeros((2,), mx.int32)}, r"labels must have one entry .*\(3,\), found \(2,\)"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, IncompatibleError), match=message):
        KLDivergenceLoss()(logits_of((3, 9), 0), logits_of((3, 9), 1), **arguments)


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"student's shape \(3, 9\), found \(3, 8\)"):
        KLDivergenceLoss()(logits_of((3, 9), 0), logits_of((3, 8), 1))


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_beta_is_checked_when_the_loss_is_made(beta: float) -> None:
    with pytest.raises(UsageError, match="beta must lie strictly between 0 and 1"):
        JensenShannonLoss(beta=beta)


@EACH
def test_a_config_takes_a_loss_beside_its_name(loss: NamedLoss, function: Any) -> None:
    config = DistillConfig(loss=loss)
    assert config.divergence == loss.divergence
    assert config == DistillConfig(loss=loss.divergence.name, loss_parameter=loss.divergence.parameter)
    assert DistillConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_two_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match=r"loss_parameter must be left out .*found 0.5"):
        DistillConfig(loss=JensenShannonLoss(beta=0.3), loss_parameter=0.5)


def test_a_distiller_steps_by_it(tiny_teacher: Path, tiny_student: Path) -> None:
    teacher, student = load_model(tiny_teacher), load_model(tiny_student)
    loss, ids = JensenShannonLoss(beta=0.3), np.array([[5, 9, 2, 77, 30, 4]], np.int32)
    batch = TextBatch.of(ids)
    expected = loss(
        student.full(mx.array(ids), batch.documents),
        teacher.full(mx.array(ids), batch.documents),
        temperature=2.0, mask=mx.array(batch.loss_mask), labels=mx.array(batch.labels), alpha=0.5,
    )  # fmt: skip
    stepped = Distiller(teacher, student, DistillConfig(loss=loss)).step(ids)
    assert stepped.total.item() == pytest.approx(expected.item(), rel=1e-4)

"""The distiller: the README's examples, live and cached teachers, and what one step does to the weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.hidden import HiddenStateLoss
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.schedule import TemperatureSchedule
from pmetal_distill.target import TeacherTarget
from pmetal_distill.teaching import TextBatch
from schemas.errors import IncompatibleError, ModelError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def teacher(tiny_teacher: Path) -> LoadedModel:
    return load_model(tiny_teacher)


@pytest.fixture
def student(tiny_student: Path) -> LoadedModel:
    return load_model(tiny_student)


@pytest.fixture
def dataloader() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 320, (2, 12)).astype(np.int32)] * 4


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def totals(distiller: Distiller, batches: Any) -> list[float]:
    return [distiller.step(batch).total.item() for batch in batches]


def quick() -> optim.Optimizer:
    return optim.Adam(learning_rate=3e-3)


def test_readme_basic(teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]) -> None:
    config = DistillConfig(temperature=2.0, alpha=0.5)
    distiller = Distiller(teacher, student, config, optimizer=quick())
    losses = []
    for batch in dataloader:
        loss = distiller.step(batch)
        losses.append(loss.total.item())
    assert losses[-1] < 0.95 * losses[0]
    assert loss.total.item() == pytest.approx(0.5 * 4 * loss.soft.item() + 0.5 * loss.hard.item(), rel=1e-5)


def test_readme_hidden_state_alignment(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    config = DistillConfig(hidden_loss=HiddenStateLoss.COSINE, hidden_layers=[1, 3], hidden_weight=10.0)
    distiller = Distiller(teacher, student, config, optimizer=quick())
    parts = [distiller.step(batch) for batch in dataloader]
    assert parts[-1].hidden.item() < parts[0].hidden.item()
    first = parts[0]
    expected = 2.0 * first.soft.item() + 0.5 * first.hard.item() + 10 * first.hidden.item()
    assert first.total.item() == pytest.approx(expected, rel=1e-5)


def test_readme_progressive_temperature(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    schedule = TemperatureSchedule.linear(start=4.0, end=1.0, steps=2)
    distiller = Distiller(teacher, student, DistillConfig(temperature=schedule, alpha=1.0), optimizer=quick())
    for temperature, batch in zip((4.0, 2.5, 1.0, 1.0), dataloader, strict=True):
        loss = distiller.step(batch)
        assert loss.total.item() == pytest.approx(temperature**2 * loss.soft.item(), rel=1e-5)


def test_a_step_is_the_optimizer_on_the_gradient_of_the_full_loss(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    """Against logits of all tokens, losses on logits, and MLX's own autodiff."""
    ids = mx.array(dataloader[0])
    text = TextBatch.of(dataloader[0])
    target = TeacherTarget.dense(teacher.full(ids))

    def loss(model: nn.Module) -> mx.array:
        logits = model(ids)
        mask = mx.array(text.loss_mask).astype(mx.float32)
        soft = divergence_loss(logits, target, divergence=DistillConfig().divergence, temperature=2.0)
        hard = hard_cross_entropy(logits, mx.array(text.labels))
        return (0.5 * 4 * (soft * mask).sum() + 0.5 * hard.sum()) / mask.sum()

    value, gradients = nn.value_and_grad(student.model, loss)(student.model)
    gradients, _ = optim.clip_grad_norm(gradients, 0.5)
    before, slopes = weights(student.model), dict(tree_flatten(gradients))
    config = DistillConfig(max_grad_norm=0.5)
    found = Distiller(teacher, student, config, optimizer=optim.SGD(learning_rate=0.1)).step(dataloader[0])
    assert found.total.item() == pytest.approx(value.item(), rel=1e-5)
    for name, after in weights(student.model).items():
        np.testing.assert_allclose(
            after, before[name] - 0.1 * np.array(slopes[name]), atol=1e-6, err_msg=name
        )


def test_accumulated_batches_make_one_update(
    teacher: LoadedModel, tiny_student: Path, dataloader: list[np.ndarray]
) -> None:
    batch = dataloader[0]
    results = []
    for every, batches in ((1, [batch]), (2, [batch[:1], batch[1:]])):
        student = load_model(tiny_student)
        config = DistillConfig(accumulation_steps=every)
        distiller = Distiller(teacher, student, config, optimizer=optim.SGD(learning_rate=0.1))
        before = weights(student.model)
        for part in batches[:-1]:
            distiller.step(part)
            assert all(np.array_equal(before[n], w) for n, w in weights(student.model).items())
        distiller.step(batches[-1])
        assert distiller.updates == 1
        results.append(weights(student.model))
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=1e-6, err_msg=name)


def test_compiled_steps_equal_eager_ones(
    teacher: LoadedModel, tiny_student: Path, dataloader: list[np.ndarray]
) -> None:
    schedule = TemperatureSchedule.linear(start=4.0, end=1.0, steps=3)
    runs = []
    for compiled in (False, True):
        config = DistillConfig(temperature=schedule, compiled=compiled, hidden_loss=HiddenStateLoss.MSE,
                               hidden_layers=(1,))  # fmt: skip
        distiller = Distiller(teacher, load_model(tiny_student), config, optimizer=quick())
        runs.append((totals(distiller, dataloader), len(distiller._functions)))
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-4)
    assert (runs[0][1], runs[1][1]) == (0, 1)


def test_compiled_updates_equal_eager_ones(
    teacher: LoadedModel, tiny_student: Path, dataloader: list[np.ndarray]
) -> None:
    results = []
    for compiled in (False, True):
        student = load_model(tiny_student)
        config = DistillConfig(compiled=compiled, accumulation_steps=2, max_grad_norm=0.1)
        parts = [optim.SGD(0.1, momentum=0.9), optim.AdamW(optim.cosine_decay(3e-3, 5))]
        optimizer = optim.MultiOptimizer(parts, [lambda name, w: "mlp" in name])
        distiller = Distiller(teacher, student, config, optimizer=optimizer)
        totals(distiller, dataloader)
        optimizer.state = {
            "states": [{**state, "step": mx.array(0, mx.uint64)} for state in optimizer.state["states"]]
        }
        totals(distiller, dataloader)
        assert [int(state["step"].item()) for state in optimizer.state["states"]] == [2, 2]
        results.append(weights(student.model))
    for name, value in results[0].items():
        np.testing.assert_allclose(results[1][name], value, atol=1e-4, err_msg=name)


def test_frozen_parameters_stay(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    student.model.freeze()
    student.model.layers[0].unfreeze()
    before = weights(student.model)
    Distiller(teacher, student, optimizer=quick()).step(dataloader[0])
    changed = {
        name for name, value in weights(student.model).items() if not np.array_equal(value, before[name])
    }
    assert changed
    assert all("layers.0." in name for name in changed)


@pytest.fixture
def cached() -> Iterator[tuple[LogitCache, Any]]:
    cache = LogitCache(GOLDEN / "v1-sketch", hidden_layers=(1, 4))
    with cache.batches(batch_size=4, seed=0, pad_multiple=4) as batches:
        yield cache, batches


def test_cached_teacher_of_another_width(student: LoadedModel, cached: tuple[LogitCache, Any]) -> None:
    cache, batches = cached
    config = DistillConfig(
        loss="jensen_shannon", hidden_loss=HiddenStateLoss.MSE, hidden_layers=(1, 4), student_layers=(0, 1)
    )
    distiller = Distiller(cache, student, config, optimizer=quick())
    batch = next(batches)
    before = weights(distiller.trained.aligner)
    losses = [distiller.step(batch) for _ in range(4)]
    assert losses[-1].total.item() < losses[0].total.item()
    assert losses[0].num_soft.item() == batch.num_trained_tokens
    assert all(not np.array_equal(before[n], w) for n, w in weights(distiller.trained.aligner).items())


def test_cached_loss_is_that_of_its_targets(student: LoadedModel, cached: tuple[LogitCache, Any]) -> None:
    cache, batches = cached
    batch = next(batches)
    distiller = Distiller(cache, student, DistillConfig(alpha=1.0))
    rows = distiller.rows(batch, temperatures=(1.0, 2.0))
    states = student.hidden(mx.array(batch.token_ids), documents=batch.documents).final
    target, _ = distiller.teacher.answer(batch, ())
    logits = student.logits(states).reshape(-1, student.vocab_size)[:, :300]
    expected = divergence_loss(logits, target, divergence=DistillConfig().divergence, temperature=2.0)
    mask = batch.loss_mask.reshape(-1)
    np.testing.assert_allclose(np.array(rows.soft[1]), np.array(expected) * mask, rtol=1e-4, atol=1e-5)
    loss = distiller.step(batch)
    assert loss.soft.item() == pytest.approx(rows.soft[1].sum().item() / mask.sum(), rel=1e-4)


def test_a_batch_sent_ahead_trains_the_same(tiny_student: Path, cached: tuple[LogitCache, Any]) -> None:
    cache, batches = cached
    first, second = next(batches), next(batches)
    order = [first, second, first, second]
    runs = []
    for upcoming in ([None] * 4, [second, first, second, None], [first, first, None, first]):
        distiller = Distiller(
            cache, load_model(tiny_student), DistillConfig(compiled=True), optimizer=quick()
        )
        sent: list[Any] = []
        send = distiller._send
        distiller._send = lambda text, send=send, sent=sent: (sent.append(text), send(text))[1]  # type: ignore[method-assign]
        steps = zip(order, upcoming, strict=True)
        losses = [distiller.step(batch, upcoming=coming).total.item() for batch, coming in steps]
        runs.append((losses, weights(distiller.trained), len(sent)))
    assert runs[0][0] == runs[1][0] == runs[2][0]
    for name, array in runs[0][1].items():
        np.testing.assert_array_equal(array, runs[1][1][name])
        np.testing.assert_array_equal(array, runs[2][1][name])
    assert [sent for *_, sent in runs] == [4, 4, 6]


def test_taid_moves_the_teacher_and_its_state_survives(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    config = DistillConfig(taid=TaidSchedule(start=0.0), taid_steps=2)
    distiller = Distiller(teacher, student, config, optimizer=optim.SGD(learning_rate=0.0))
    soft = [distiller.step(batch).soft.item() for batch in dataloader]
    assert soft[0] == pytest.approx(0.0, abs=1e-6)
    assert soft == sorted(soft)
    state = distiller.state
    assert state.record["taid"][0] == 1.0
    other = Distiller(teacher, student, config)
    other.state = state
    assert other.state.record == state.record


def test_wrong_uses_are_refused(
    teacher: LoadedModel, student: LoadedModel, cached: tuple[LogitCache, Any], dataloader: list[np.ndarray]
) -> None:
    cache, batches = cached
    with pytest.raises(UsageError, match="reverse_kl needs the teacher's whole distribution"):
        Distiller(LogitCache(GOLDEN / "v1-none"), student, DistillConfig(loss="reverse_kl"))
    with pytest.raises(IncompatibleError, match="needs batches of its cache, found text alone"):
        Distiller(cache, student).step(dataloader[0])
    with pytest.raises(UsageError, match="the teacher has layers -4 to 3, found 9"):
        Distiller(teacher, student, DistillConfig(hidden_loss=HiddenStateLoss.MSE, hidden_layers=(9,)))
    cooling = TemperatureSchedule.linear(start=4.0, end=0.5, steps=1000)
    with pytest.raises(UsageError, match=r"temperature: must be at least 1 at every step.*found 0\.5"):
        Distiller(cache, student, DistillConfig(temperature=cooling))
    assert Distiller(teacher, student, DistillConfig(temperature=cooling)).updates == 0
    aligned = DistillConfig(hidden_loss=HiddenStateLoss.MSE, hidden_layers=(1,))
    with pytest.raises(UsageError, match=r"must say how many layers .*DistillConfig\(student_layers="):
        Distiller(cache, student, aligned)
    with pytest.raises(UsageError, match="gives no hidden states"):
        Distiller(LogitCache(GOLDEN / "v1-bucket"), student, aligned)
    missing = DistillConfig(hidden_loss=HiddenStateLoss.MSE, hidden_layers=(2,), student_layers=(0,))
    with pytest.raises(IncompatibleError, match=r"missing \[2\]; open the cache with hidden_layers=\[2\]"):
        Distiller(cache, student, missing).step(next(batches))


class SortedMLP(nn.Module):
    """A layer with a forward pass only: MLX has no derivative by the indices of a gather."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array) -> mx.array:
        return mx.take_along_axis(self.inner(x), mx.argsort(x, axis=-1), axis=-1)


def test_a_student_without_a_backward_pass_is_a_model_error(
    teacher: LoadedModel, student: LoadedModel, dataloader: list[np.ndarray]
) -> None:
    student.model.layers[0].mlp = SortedMLP(student.model.layers[0].mlp)
    distiller = Distiller(teacher, student)
    with pytest.raises(
        ModelError, match=r"must have a derivative, found .*'llama': \[\w+\] Cannot calculate VJP"
    ):
        distiller.step(dataloader[0])


def test_a_student_of_a_class_that_mlx_cannot_train_is_a_model_error(
    teacher: LoadedModel, student: LoadedModel
) -> None:
    """Its `__init__` leaves out that of nn.Module; loading mends this, but not in later layers."""
    del vars(student.model.layers[0])["_no_grad"]
    with pytest.raises(ModelError, match=r"llama.*of mlx-lm, where .*_no_grad"):
        Distiller(teacher, student)

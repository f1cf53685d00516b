"""The precision policy: types of teachers and students, masters that add up, what is saved and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill import DistillConfig, Distiller, load_model, save_model
from pmetal_distill.adapters import AdapterSpec, add_adapters
from pmetal_distill.models import LoadedModel, wrap_model
from pmetal_distill.precision import (
    StudentPrecision,
    choose_precision,
    float_types,
    prepare_weights,
    stored_weights,
    teacher_type,
)
from schemas.errors import CheckpointError, UsageError
from tests.tiny import build_tiny_model

HALVES = (mx.bfloat16, mx.float16)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this package does on a GPU, with MLX's arithmetic on the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[mx.Dtype, Path]:
    """One tiny model in three types."""
    root = tmp_path_factory.mktemp("models")
    whole = build_tiny_model(root / "float32", hidden_size=32, seed=3)
    found = {mx.float32: whole}
    for dtype in HALVES:
        loaded = load_model(whole)
        weights = {n: a.astype(dtype) for n, a in tree_flatten(loaded.model.parameters())}
        plain: Any = {"tokenizer": loaded.tokenizer, "config": loaded.config, "weights": weights}
        found[dtype] = save_model(loaded.model, root / str(dtype).rpartition(".")[2], **plain)
    return found


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def _batch(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(5, 250, (2, 24)).astype(np.int32)


def test_a_teacher_on_a_cpu_is_float32_unless_told(folders: dict[mx.Dtype, Path]) -> None:
    for dtype, folder in folders.items():
        loaded = load_model(folder)
        assert loaded.dtype == "float32"
        assert set(loaded.stored.values()) == {dtype}
    assert load_model(folders[mx.float32], dtype="bfloat16").dtype == "bfloat16"


def test_a_teacher_on_a_gpu_keeps_its_half_precision(folders: dict[mx.Dtype, Path], on_gpu: None) -> None:
    found = {dtype: load_model(folder).dtype for dtype, folder in folders.items()}
    assert found == {mx.float32: "bfloat16", mx.bfloat16: "bfloat16", mx.float16: "float16"}
    assert load_model(folders[mx.float16], dtype="float32").dtype == "float32"


@pytest.mark.parametrize(
    "call", [lambda: teacher_type("half", mx.float32), lambda: choose_precision("fp8", {})]
)  # type: ignore[arg-type]
def test_an_unknown_type_is_refused(call: Any) -> None:
    with pytest.raises(UsageError, match=r"must be .*float32.*found"):
        call()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_thousand_small_updates_add_up(
    folders: dict[mx.Dtype, Path], on_gpu: None, dtype: mx.Dtype
) -> None:
    """0.5 minus 1,000 times 1e-4 is 0.4; in bfloat16 each of these updates is rounded away."""
    moved: dict[StudentPrecision, float] = {}
    for name in ("mixed", "bfloat16"):
        student = load_model(folders[dtype])
        distiller = Distiller(
            load_model(folders[mx.float32]),
            student,
            DistillConfig(precision=name, compiled=False),
            optimizer=optim.SGD(learning_rate=1e-4),
        )
        weight = distiller.trained.student.model.norm
        weight.weight = mx.full(weight.weight.shape, 0.5, weight.weight.dtype)
        ones = {"student": {"model": {"norm": {"weight": mx.ones_like(weight.weight)}}}}
        for _ in range(1000):
            distiller.trained.update(distiller.optimizer.apply_gradients(ones, distiller.trained))
        mx.eval(distiller.trained.parameters())
        moved[name] = 0.5 - weight.weight[0].item()  # type: ignore[operator]
    assert moved["mixed"] == pytest.approx(0.1, rel=1e-3)
    assert moved["bfloat16"] == 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_mixed_trains_half_precision_students_as_float32_does(
    folders: dict[mx.Dtype, Path], tmp_path: Path, on_gpu: None, dtype: mx.Dtype, compiled: bool
) -> None:
    ends = {}
    teacher = load_model(build_tiny_model(tmp_path / "teacher", hidden_size=48), dtype="float32")
    for name in ("mixed", "float32"):
        student = load_model(folders[dtype])
        config = DistillConfig(alpha=1.0, precision=name, compiled=compiled)  # type: ignore[arg-type]
        optimizer = optim.AdamW(learning_rate=3e-3, bias_correction=True)
        distiller = Distiller(teacher, student, config, optimizer=optimizer)
        losses = [distiller.step(_batch(seed % 4)).soft.item() for seed in range(24)]
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.9 * losses[0]  # type: ignore[operator]
        assert {a.dtype for a in _parameters(student.model).values()} == {mx.float32}
        ends[name] = losses[-1]
    assert ends["mixed"] == pytest.approx(ends["float32"], rel=0.05)


def test_gradients_of_a_frequent_token_are_summed_in_float32(
    folders: dict[mx.Dtype, Path], on_gpu: None
) -> None:
    """2,048 places of one token: a bfloat16 sum stops growing where a term is below half of its last bit."""
    student = load_model(folders[mx.bfloat16])
    precision = prepare_weights(student.model, "mixed", student.stored)
    ids, ones = mx.full((2048,), 7), mx.ones((32,), mx.bfloat16)

    def total(weight: mx.array) -> mx.array:
        student.model.model.embed_tokens.weight = weight
        rows = precision.computing(student.model).model.embed_tokens(ids)
        assert rows.dtype == mx.bfloat16
        return (rows * ones).astype(mx.float32).sum()

    gradient = mx.grad(total)(student.model.model.embed_tokens.weight)
    assert gradient.dtype == mx.float32
    np.testing.assert_array_equal(np.array(gradient[7]), np.full(32, 2048.0))


def test_the_view_shares_nothing_that_training_replaces(folders: dict[mx.Dtype, Path], on_gpu: None) -> None:
    student = load_model(folders[mx.bfloat16])
    precision = prepare_weights(student.model, None, student.stored)
    before = {name: id(array) for name, array in _parameters(student.model).items()}
    view = precision.computing(student.model)
    kinds = {a.dtype for n, a in _parameters(view).items() if "embed" not in n}
    assert kinds == {mx.bfloat16}
    view.model.norm.weight = mx.zeros((32,))
    assert before == {name: id(array) for name, array in _parameters(student.model).items()}
    plain = wrap_model(load_model(folders[mx.bfloat16]).model, student.tokenizer, student.config)
    ids = mx.array(_batch())
    ours = replace(student, model=precision.computing(student.model))
    np.testing.assert_allclose(*(np.array(m.full(ids).astype(mx.float32)) for m in (ours, plain)), atol=0.02)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_are_float32_beside_frozen_half_precision(
    folders: dict[mx.Dtype, Path], on_gpu: None, dtype: mx.Dtype, kind: Any
) -> None:
    student = add_adapters(load_model(folders[dtype]), AdapterSpec(kind, rank=4), seed=0)
    teacher = load_model(folders[mx.float32])
    distiller = Distiller(
        teacher, student, DistillConfig(compiled=False), optimizer=optim.AdamW(learning_rate=1e-3)
    )
    assert distiller.precision.name == "mixed"
    losses = [distiller.step(_batch(1)).total.item() for _ in range(8)]
    assert np.isfinite(losses).all()
    trained = dict(tree_flatten(student.model.trainable_parameters()))
    assert {a.dtype for a in trained.values()} == {mx.float32}
    frozen = {a.dtype for n, a in _parameters(student.model).items() if n not in trained}
    assert frozen == {mx.bfloat16}
    states = {a.dtype for n, a in distiller.state.arrays.items() if n.startswith("optimizer.student")}
    assert states == {mx.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_student_is_saved_in_its_own_type(
    folders: dict[mx.Dtype, Path], tmp_path: Path, dtype: mx.Dtype
) -> None:
    student = load_model(folders[dtype])
    distiller = Distiller(load_model(folders[mx.float32]), student, optimizer=optim.AdamW(learning_rate=1e-2))
    distiller.step(_batch())
    saved = mx.load(str(save_model(student, tmp_path / "saved") / "model.safetensors"))
    assert {array.dtype for array in saved.values()} == {dtype}  # type: ignore[union-attr]
    masters = _parameters(student.model)
    assert {array.dtype for array in masters.values()} == {mx.float32}
    for name, array in saved.items():  # type: ignore[union-attr]
        assert mx.array_equal(array, masters[name].astype(dtype)), name


def test_a_state_of_another_precision_is_refused(folders: dict[mx.Dtype, Path]) -> None:
    def distiller(name: StudentPrecision) -> Distiller:
        return Distiller(
            load_model(folders[mx.float32]), load_model(folders[mx.bfloat16]), DistillConfig(precision=name)
        )

    state = distiller("mixed").state
    with pytest.raises(CheckpointError, match="precision: must be 'mixed'"):
        distiller("float32").state = state
    distiller("mixed").state = state


def test_weights_kept_in_float32_on_purpose_stay_so(folders: dict[mx.Dtype, Path], on_gpu: None) -> None:
    """Of a half-precision model: what its file has in float32, or its class declares."""
    loaded = load_model(folders[mx.bfloat16])
    stored = {**loaded.stored, "model.norm.weight": mx.float32}
    loaded.model.model.norm.weight = loaded.model.model.norm.weight.astype(mx.float32)
    precision = prepare_weights(loaded.model, None, stored)
    assert "model.norm.weight" not in precision.copies
    assert precision.computing(loaded.model).model.norm.weight.dtype == mx.float32
    weights = stored_weights(_parameters(loaded.model), stored)
    assert weights["model.norm.weight"].dtype == mx.float32
    assert weights["model.embed_tokens.weight"].dtype == mx.bfloat16


def test_a_model_in_memory_has_its_own_types(folders: dict[mx.Dtype, Path]) -> None:
    loaded: LoadedModel = load_model(folders[mx.bfloat16], dtype="bfloat16")
    wrapped = wrap_model(loaded.model, loaded.tokenizer, loaded.config)
    assert dict(wrapped.stored) == float_types(loaded.model)

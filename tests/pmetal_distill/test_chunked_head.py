"""The chunked head against the float64 reference: both back ends, compiled or not, every kind of head."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.losses.chunked_head import Backend, HeadOptions, LossParts, head_loss, head_rows
from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.losses.head import HeadParts, PackedWeight
from pmetal_distill.target import TargetKind, TeacherTarget
from schemas.errors import IncompatibleError, UsageError
from tests import reference
from tests.pmetal_distill.loss_cases import KINDS, Case, case_options, make_case, smooth

BACKENDS: tuple[Backend, ...] = ("plain", "host")
WIDTH = 6
PAIRS = [(k, n) for k in KINDS for n in LOSS_NAMES if not (k == "none" and n == "reverse_kl")]


@dataclass(frozen=True)
class Head:
    """A random head: logits are `softcap tanh(scale (hidden W' + bias) / softcap)`."""

    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    scale: float | None
    softcap: float | None

    @staticmethod
    def random(case: Case, *, bias: bool, scale: float | None, softcap: float | None) -> "Head":
        """A head for the tokens and vocabulary of a case; its logits replace the case's student."""
        rng = np.random.default_rng(7)
        n, vocab = case.student.shape
        draw = [rng.standard_normal(s).astype(np.float32) for s in ((n, WIDTH), (vocab, WIDTH), (vocab,))]
        return Head(draw[0], draw[1] * 2, draw[2] if bias else None, scale, softcap)

    def parts(self, weight: mx.array, bias: mx.array | None) -> HeadParts:
        return HeadParts(weight, bias, self.scale, self.softcap)

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and their derivative by the products, float64."""
        raw = self.hidden.astype(np.float64) @ self.weight.T.astype(np.float64)
        raw = raw if self.bias is None else raw + self.bias
        scale = 1.0 if self.scale is None else self.scale
        if self.softcap is None:
            return raw * scale, np.full_like(raw, scale)
        capped = self.softcap * np.tanh(raw * scale / self.softcap)
        return capped, scale * (1 - (capped / self.softcap) ** 2)


def expected(case: Case, head: Head, alpha: float) -> tuple[float, float, float, list[np.ndarray]]:
    """Reference total, soft, hard, and gradients by hidden states, weight and bias."""
    logits, slope = head.logits()
    soft, soft_rows = case.soft(logits)
    labels = np.where(case.mask > 0, case.labels, -100)
    hard, hard_rows = reference.hard_loss_and_gradient(logits, labels)
    num_soft, num_hard = max(case.mask.sum(), 1e-9), max((labels != -100).sum(), 1e-9)
    t2 = case.temperature**2
    soft_mean, hard_mean = (soft * case.mask).sum() / num_soft, hard.sum() / num_hard
    rows = alpha * t2 * soft_rows * case.mask[:, None] / num_soft + (1 - alpha) * hard_rows / num_hard
    rows *= slope
    gradients = [rows @ head.weight, rows.T @ head.hidden, rows.sum(axis=0)]
    return alpha * t2 * soft_mean + (1 - alpha) * hard_mean, soft_mean, hard_mean, gradients


def run(
    case: Case,
    head: Head,
    *,
    alpha: float,
    backend: Backend = "auto",
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> tuple[LossParts, list[np.ndarray]]:
    """The real function and its gradients."""
    arrays = [mx.array(a) for a in (head.hidden, head.weight, head.bias) if a is not None]
    options = HeadOptions(backend=backend, chunk_tokens=chunk_tokens)

    def loss(hidden: mx.array, weight: mx.array, bias: mx.array | None = None) -> LossParts:
        return head_loss(
            hidden, head.parts(weight, bias), case.target.at(case.temperature), mx.array(case.labels),
            mx.array(case.mask), divergence=case.divergence, alpha=alpha, options=options,
        )  # fmt: skip

    step: Callable[..., Any] = mx.value_and_grad(loss, argnums=tuple(range(len(arrays))))
    parts, gradients = (mx.compile(step) if compiled else step)(*arrays)
    return LossParts(*parts), [np.array(g) for g in gradients]


def check(case: Case, head: Head, *, alpha: float, **settings: Any) -> None:
    """Values within 1e-5, gradients within 1e-5 of the largest."""
    parts, gradients = run(case, head, alpha=alpha, **settings)
    total, soft, hard, slopes = expected(case, head, alpha)
    for found, wanted in ((parts.total, total), (parts.soft, soft), (parts.hard, hard)):
        rounding = 1e-6 * (case.temperature**2 if found is parts.total else 1.0)
        np.testing.assert_allclose(found.item(), wanted, rtol=1e-5, atol=rounding + 1e-6)
    if smooth(case):
        for found, wanted in zip(gradients, slopes, strict=False):
            np.testing.assert_allclose(found, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max(), abs(total)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_loss_and_kind(kind: TargetKind, name: str, backend: Backend) -> None:
    case = make_case(kind, Divergence(name), vocab=150, k=7, num_tokens=9)
    head = Head.random(case, bias=True, scale=0.5, softcap=20.0)
    check(case, head, alpha=0.3, backend=backend, chunk_tokens=4)


@settings(max_examples=80)
@given(
    options=case_options(),
    backend=st.sampled_from(BACKENDS),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_tokens=st.integers(1, 10),
    bias=st.booleans(),
    scale=st.sampled_from([None, 0.25, 4.0]),
    softcap=st.sampled_from([None, 15.0]),
)
def test_any_head_size_mask_and_chunk(
    options: dict[str, Any],
    backend: Backend,
    alpha: float,
    chunk_tokens: int,
    bias: bool,
    scale: float | None,
    softcap: float | None,
) -> None:
    case = make_case(**options)
    head = Head.random(case, bias=bias, scale=scale, softcap=softcap)
    check(case, head, alpha=alpha, backend=backend, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_step_equals_the_plain_one(kind: TargetKind) -> None:
    case = make_case(kind, Divergence("jensen_shannon"), vocab=150, k=7, num_tokens=9)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    check(case, head, alpha=0.5, chunk_tokens=4, compiled=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_equals_unchunked_losses_on_logits(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence("forward_kl"), vocab=1500, k=7, num_tokens=40)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    labels, mask = mx.array(case.labels), mx.array(case.mask)

    def unchunked(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        soft = divergence_loss(logits, case.target, divergence=case.divergence, temperature=2.0)
        hard = hard_cross_entropy(logits, mx.where(mask > 0, labels, -100))
        valid = ((labels != -100) * mask).sum()
        return 0.5 * 4 * (soft * mask).sum() / mask.sum() + 0.5 * hard.sum() / valid

    arrays = (mx.array(head.hidden), mx.array(head.weight))
    value, gradients = mx.value_and_grad(unchunked, argnums=(0, 1))(*arrays)
    parts, found = run(case, head, alpha=0.5, backend=backend, chunk_tokens=16)
    np.testing.assert_allclose(parts.total.item(), value.item(), rtol=1e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, np.array(b), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_that_of_the_total_only_and_scales_with_its_cotangent(backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=False, scale=None, softcap=None)

    def scaled(factor: float, field: str) -> mx.array:
        def loss(hidden: mx.array) -> mx.array:
            parts = head_loss(
                hidden, HeadParts(mx.array(head.weight)), case.target.at(2.0), mx.array(case.labels),
                mx.array(case.mask), options=HeadOptions(backend=backend),
            )  # fmt: skip
            return factor * getattr(parts, field)

        return mx.grad(loss)(mx.array(head.hidden))

    assert mx.allclose(scaled(3.0, "total"), 3 * scaled(1.0, "total"), atol=1e-6)
    assert mx.abs(scaled(1.0, "soft")).max().item() == 0.0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_models(dtype: mx.Dtype, backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=300, k=7, num_tokens=20)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    rounded = Head(
        *(
            np.array(mx.array(a).astype(dtype).astype(mx.float32))
            for a in (head.hidden, head.weight, head.bias)
        ),
        None,
        None,
    )

    def loss(hidden: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return head_loss(
            hidden, HeadParts(weight, bias), case.target.at(2.0), mx.array(case.labels), mx.array(case.mask),
            options=HeadOptions(backend=backend, chunk_tokens=7),
        ).total  # fmt: skip

    arrays = [mx.array(a).astype(dtype) for a in (rounded.hidden, rounded.weight, rounded.bias)]
    value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    total, _, _, slopes = expected(case, rounded, 0.5)
    unit = 2**-10 if dtype == mx.float16 else 2**-7
    np.testing.assert_allclose(value.item(), total, rtol=2 * unit)
    for found, wanted in zip(gradients, slopes, strict=True):
        assert found.dtype == dtype
        close = np.abs(np.array(found.astype(mx.float32)) - wanted).max() / np.abs(wanted).max()
        assert close < 8 * unit


def model_head(module: nn.Module) -> Any:
    """A model's head around a layer."""

    @dataclass
    class Wrapped:
        module: nn.Module
        scale: float | None = None
        softcap: float | None = None

    return Wrapped(module)


def layer_loss(case: Case, backend: Backend) -> Callable[[nn.Module, mx.array], mx.array]:
    def loss(module: nn.Module, hidden: mx.array) -> mx.array:
        return head_loss(
            hidden, HeadParts.of(model_head(module)), case.target.at(2.0), mx.array(case.labels),
            mx.array(case.mask), options=HeadOptions(backend=backend, chunk_tokens=3),
        ).total  # fmt: skip

    return loss


def direct_loss(case: Case) -> Callable[[nn.Module, mx.array], mx.array]:
    def loss(module: nn.Module, hidden: mx.array) -> mx.array:
        logits = module.as_linear(hidden) if hasattr(module, "as_linear") else module(hidden)
        mask, labels = mx.array(case.mask), mx.array(np.where(case.mask > 0, case.labels, -100))
        soft = divergence_loss(logits, case.target, divergence=case.divergence, temperature=2.0)
        hard = hard_cross_entropy(logits, labels)
        return 0.5 * 4 * (soft * mask).sum() / mask.sum() + 0.5 * hard.sum() / (labels != -100).sum()

    return loss


def adapted(kind: str) -> nn.Module:
    """The layers that a head may be, with adapters that do something."""
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

    mx.random.seed(0)
    base = nn.Embedding(96, 64) if "embedding" in kind else nn.Linear(64, 96, bias="bias" in kind)
    if "quantized" in kind:
        base = base.to_quantized(group_size=32, bits=8)
    if "dora" in kind:
        base = (DoRAEmbedding if "embedding" in kind else DoRALinear).from_base(base, r=4, scale=2.0)
    elif "lora" in kind:
        base = (LoRAEmbedding if "embedding" in kind else LoRALinear).from_base(base, r=4, scale=2.0)
    if "ora" in kind:
        base.lora_b = mx.random.normal(base.lora_b.shape) * 0.1
        base.lora_a = mx.random.normal(base.lora_a.shape) * 0.1
        base.freeze()
        base.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    if "frozen" in kind:
        base.freeze()
    return base


LAYERS = [
    "linear", "linear bias", "linear bias frozen", "embedding", "embedding frozen", "quantized linear bias",
    "quantized embedding", "lora linear bias", "lora quantized linear", "lora embedding", "dora linear bias",
    "dora embedding",
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_models(layer: str, backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=96, k=7, num_tokens=8)
    module = adapted(layer)
    hidden = mx.random.normal((8, 64), key=mx.random.key(3))
    found, wanted = layer_loss(case, backend)(module, hidden), direct_loss(case)(module, hidden)
    np.testing.assert_allclose(found.item(), wanted.item(), rtol=1e-5)
    if module.trainable_parameters():
        _, gradients = nn.value_and_grad(module, layer_loss(case, backend))(module, hidden)
        _, slopes = nn.value_and_grad(module, direct_loss(case))(module, hidden)
        flat, expected_flat = dict(nn.utils.tree_flatten(gradients)), dict(nn.utils.tree_flatten(slopes))
        assert flat.keys() == expected_flat.keys()
        for name, slope in expected_flat.items():
            np.testing.assert_allclose(np.array(flat[name]), np.array(slope), atol=1e-5, err_msg=name)
    by_hidden = mx.grad(lambda h: layer_loss(case, backend)(module, h))(hidden)
    by_hidden_direct = mx.grad(lambda h: direct_loss(case)(module, h))(hidden)
    np.testing.assert_allclose(np.array(by_hidden), np.array(by_hidden_direct), atol=1e-5)


def test_head_adapter_with_dropout_is_refused() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    layer = LoRALinear.from_base(nn.Linear(64, 96), r=4, dropout=0.1)
    with pytest.raises(UsageError, match="dropout 0"):
        HeadParts.of(model_head(layer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_tied_matrix_add_up(backend: Backend) -> None:
    case = make_case("bucket", Divergence(), vocab=50, k=7, num_tokens=5)
    tokens, weight = mx.array([1, 2, 3, 2, 1]), mx.random.normal((50, 8), key=mx.random.key(0))

    def tied(w: mx.array) -> mx.array:
        return head_loss(
            mx.tanh(w[tokens]), HeadParts(w), case.target.at(2.0), mx.array(case.labels), mx.array(case.mask),
            options=HeadOptions(backend=backend),
        ).total  # fmt: skip

    gradient, h = mx.grad(tied)(weight), 1e-2
    for row, column in ((1, 0), (2, 3), (7, 1)):
        step = mx.zeros_like(weight)
        step[row, column] = h
        difference = (tied(weight + step) - tied(weight - step)).item() / (2 * h)
        assert gradient[row, column].item() == pytest.approx(difference, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_for_evaluation(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence(), vocab=200, k=9, num_tokens=11, temperature=4.0)
    head = Head.random(case, bias=True, scale=None, softcap=10.0)
    assert head.bias is not None
    rows = head_rows(
        mx.array(head.hidden), head.parts(mx.array(head.weight), mx.array(head.bias)),
        [case.target.at(1.0), case.target.at(4.0)], mx.array(case.labels), mx.array(case.mask),
        options=HeadOptions(backend=backend, chunk_tokens=4),
    )  # fmt: skip
    logits, _ = head.logits()
    labels = np.where(case.mask > 0, case.labels, -100)
    assert rows.soft.shape == (2, 11)
    np.testing.assert_allclose(np.array(rows.soft[1]), case.soft(logits)[0] * case.mask, rtol=1e-5, atol=1e-6)
    hard = reference.hard_loss_and_gradient(logits, labels)[0]
    np.testing.assert_allclose(np.array(rows.hard), hard, rtol=1e-5, atol=1e-6)
    head_ids = case.target.head_ids
    best = case.events.argmax(axis=-1) if head_ids is None else np.array(head_ids[:, 0])
    for found, tokens, counts in (
        (rows.teacher_rank, best, case.mask > 0),
        (rows.label_rank, np.maximum(labels, 0), labels != -100),
    ):
        above = (logits > np.take_along_axis(logits, tokens[:, None], axis=-1)).sum(axis=-1)
        assert np.array_equal(np.array(found), above * counts)
    confidence = np.exp(reference.log_softmax(logits)).max(axis=-1) * case.mask
    np.testing.assert_allclose(np.array(rows.confidence), confidence, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_visible_where_a_token_counts_and_harmless_where_not(
    kind: TargetKind, backend: Backend
) -> None:
    case = make_case(kind, Divergence(), vocab=50, k=7, num_tokens=5)
    weight = mx.random.normal((50, 8), key=mx.random.key(0))
    hidden = mx.random.normal((5, 8), key=mx.random.key(1))
    mask = mx.array([1, 1, 0, 1, 1])

    def step(broken: int) -> tuple[mx.array, mx.array]:
        states = mx.where((mx.arange(5) == broken)[:, None], mx.nan, hidden)
        return mx.value_and_grad(
            lambda w: head_loss(
                states, HeadParts(w), case.target.at(2.0), mx.array(case.labels), mask,
                options=HeadOptions(backend=backend),
            ).total
        )(weight)  # fmt: skip

    value, gradient = step(1)
    assert np.isnan(value.item())
    assert np.isnan(np.array(gradient)).any()
    value, gradient = step(2)
    assert np.isfinite(value.item())
    assert np.isfinite(np.array(gradient)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_train_on_gives_zero(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    empty = Case(**{**case.__dict__, "mask": np.zeros(5, np.float32)})
    parts, gradients = run(empty, head, alpha=0.5, backend=backend)
    assert parts.total.item() == 0.0
    assert all(not g.any() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_parts_equal_the_whole(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=10)
    head = Head.random(case, bias=False, scale=None, softcap=None)
    whole, gradients = run(case, head, alpha=0.5, backend=backend)
    counts, sums, total = (whole.num_soft, whole.num_hard), mx.zeros((50, WIDTH)), 0.0
    for index in (slice(0, 4), slice(4, 10)):
        part, gradient = mx.value_and_grad(
            lambda w, index=index: head_loss(
                mx.array(head.hidden[index]), HeadParts(w), case.target.at(2.0).tokens(index),
                mx.array(case.labels[index]), mx.array(case.mask[index]), counts=counts,
                options=HeadOptions(backend=backend),
            ).total
        )(mx.array(head.weight))  # fmt: skip
        total, sums = total + part.item(), sums + gradient
    assert total == pytest.approx(whole.total.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(sums), gradients[1], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_student_vocabulary_is_cut_to_the_teachers(backend: Backend) -> None:
    case = make_case("sketch", Divergence(), vocab=50, k=7, num_tokens=5)
    head = Head.random(case, bias=True, scale=None, softcap=None)
    _, wanted = run(case, head, alpha=0.5, backend=backend)
    assert head.bias is not None
    weight = np.pad(head.weight, ((0, 6), (0, 0)), constant_values=9.0)
    padded = Head(head.hidden, weight, np.pad(head.bias, (0, 6)), None, None)
    _, found = run(case, padded, alpha=0.5, backend=backend)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1][:50], wanted[1], atol=1e-6)
    assert not found[1][50:].any()
    with pytest.raises(IncompatibleError, match="it has 50, the student 49"):
        head_loss(
            mx.array(head.hidden), HeadParts(mx.array(head.weight[:49])), case.target.at(2.0),
            mx.array(case.labels), mx.array(case.mask),
        )  # fmt: skip


def test_wrong_calls_are_refused() -> None:
    case = make_case("none", Divergence(), vocab=50, k=7, num_tokens=5)
    head, hidden = HeadParts(mx.zeros((50, 4))), mx.zeros((5, 4))
    soft, labels, mask = case.target.at(2.0), mx.array(case.labels), mx.array(case.mask)
    with pytest.raises(UsageError, match="reverse_kl needs the teacher's whole distribution"):
        head_loss(hidden, head, soft, labels, mask, divergence=Divergence("reverse_kl"))
    with pytest.raises(IncompatibleError, match=r"found \(5, 5, 5, 4\)"):
        head_loss(hidden, head, soft, labels, mask[:4])
    with pytest.raises(UsageError, match="chunk_tokens must be at least 1, found 0"):
        HeadOptions(chunk_tokens=0)
    with pytest.raises(UsageError, match=r"outside mx\.compile only"):
        mx.compile(
            lambda h: head_loss(h, head, soft, labels, mask, options=HeadOptions(backend="host")).total
        )(hidden)


def test_environment_forces_plain_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    from pmetal_distill.losses.chunked_head import choose_backend

    assert choose_backend(mx.zeros((1, 1)), "auto") == "host"
    monkeypatch.setenv("PMETAL_KERNELS", "plain")
    assert choose_backend(mx.zeros((1, 1)), "auto") == "plain"


def test_packed_weight_equals_its_dense_matrix() -> None:
    layer = nn.QuantizedLinear(64, 96, bias=False, group_size=32, bits=4)
    parts = HeadParts.of(model_head(layer))
    assert isinstance(parts.weight, PackedWeight)
    dense = HeadParts(parts.weight.unpacked())
    hidden = mx.random.normal((3, 64), key=mx.random.key(1))
    assert mx.allclose(parts.logits(hidden), dense.logits(hidden), atol=1e-4)
    assert mx.allclose(parts.restricted(40).logits(hidden), dense.logits(hidden)[:, :40], atol=1e-4)
    assert (parts.restricted(40).vocab_size, parts.vocab_size) == (40, 96)


@pytest.mark.parametrize(("backend", "compiled"), [("host", False), ("plain", False), ("plain", True)])
@pytest.mark.parametrize("kind", ["bucket", "sketch"])
def test_peak_memory_does_not_grow_with_tokens(kind: TargetKind, backend: Backend, compiled: bool) -> None:
    def peak(num_tokens: int) -> int:
        case = make_case(kind, Divergence(), vocab=4096, k=4, num_tokens=num_tokens)
        hidden, weight = mx.random.normal((num_tokens, 2)), mx.random.normal((4096, 2))
        soft, labels, mask = case.target.at(2.0), mx.array(case.labels), mx.array(case.mask)
        options = HeadOptions(chunk_tokens=32, backend=backend)
        step = mx.value_and_grad(
            lambda h, w: head_loss(h, HeadParts(w), soft, labels, mask, options=options).total, argnums=(0, 1)
        )
        step = mx.compile(step) if compiled else step
        mx.eval(hidden, weight, soft.arrays(), labels, mask, step(hidden, weight))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        tracemalloc.start()
        mx.eval(step(hidden, weight))
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return int(mx.get_peak_memory() - before + numpy_peak)

    assert peak(512) <= 1.1 * peak(128)


def test_dense_targets_are_not_overwritten() -> None:
    logits = mx.random.normal((5, 50), key=mx.random.key(0))
    before = np.array(logits)
    target = TeacherTarget.dense(logits).at(2.0)
    head_loss(
        mx.random.normal((5, 4)), HeadParts(mx.random.normal((50, 4))), target, mx.zeros(5, mx.int32),
        mx.ones(5), options=HeadOptions(backend="host"),
    )  # fmt: skip
    assert np.array_equal(np.array(logits), before)


def test_row_functions_follow_the_device() -> None:
    from pmetal_distill.kernels import dispatch, ops
    from pmetal_distill.losses.chunk import PLAIN_OPS, row_ops

    assert row_ops() is PLAIN_OPS
    with dispatch.using(dispatch.METAL):
        assert row_ops() is ops


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_at_all(kind: TargetKind, backend: Backend) -> None:
    case = make_case(kind, Divergence(), vocab=50, k=7, num_tokens=3)
    target = case.target.at(2.0).tokens(slice(0, 0))
    value, gradient = mx.value_and_grad(
        lambda w: head_loss(
            mx.zeros((0, 4)), HeadParts(w), target, mx.zeros(0, mx.int32), mx.zeros(0),
            options=HeadOptions(backend=backend),
        ).total
    )(mx.zeros((50, 4)))  # fmt: skip
    assert value.item() == 0.0
    assert not np.array(gradient).any()


def test_chunks_are_few_and_even() -> None:
    from pmetal_distill.losses.plain import token_slices

    assert [(s.start, s.stop) for s in token_slices(10, 4)] == [(0, 3), (3, 6), (6, 10)]
    assert [(s.start, s.stop) for s in token_slices(8, 8)] == [(0, 8)]

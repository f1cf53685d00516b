"""TeacherTarget at any temperature against the float64 reference, and its checks."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.losses.chunked_head import HeadOptions, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.reductions import NEGATIVE
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TargetKind, TeacherTarget
from schemas.arrays import TargetArrays
from schemas.basis import NO_CEILING, CoordinateGroup, SketchBasis
from schemas.errors import IncompatibleError, UsageError
from schemas.spec import TargetSpec
from schemas.tail import tail_logits
from tests import reference
from tests.pmetal_distill.loss_cases import KINDS, NODES, STYLES, make_case, make_target


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    style=st.sampled_from(STYLES),
    vocab=st.integers(7, 3000),
    k=st.integers(1, 40),
    temperature=st.floats(0.5, 8.0),
    seed=st.integers(0, 2**31),
)
def test_probabilities_equal_the_reference(
    kind: TargetKind, style: str, vocab: int, k: int, temperature: float, seed: int
) -> None:
    case = make_case(
        kind, Divergence(), vocab=vocab, k=k, temperature=temperature, teacher_style=style, seed=seed
    )
    soft = case.target.at(temperature)
    found = np.array(soft.rows() if soft.complete else soft.events(), np.float64)
    np.testing.assert_allclose(np.exp(found), np.exp(case.events), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1.0, atol=1e-5)
    possible = np.isfinite(case.events)
    np.testing.assert_allclose(found[possible], case.events[possible], rtol=1e-5, atol=2e-5)
    assert (found[~possible] == np.float32(NEGATIVE)).all()


def test_exact_teacher_gives_its_own_probabilities_at_the_nodes() -> None:
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((4, 300)).astype(np.float32) * 4
    for temperature in (0.5, 1 / 0.7, 8.0):
        target, _, ids = make_target("bucket", teacher, k=10, temperature=temperature, rng=rng)
        soft = target.at(temperature)
        expected = reference.to_events(reference.log_softmax(teacher, temperature), ids)
        np.testing.assert_allclose(np.array(soft.events()), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_selects_tokens(kind: TargetKind) -> None:
    case = make_case(kind, Divergence(), vocab=40, k=6, num_tokens=5)
    soft = case.target.at(2.0)
    part = soft.tokens(slice(1, 4))
    assert (soft.num_tokens, part.num_tokens) == (5, 3)
    read = (lambda s: s.rows()) if soft.complete else (lambda s: s.events())
    assert mx.allclose(read(part), read(soft)[1:4], atol=1e-6)
    assert mx.array_equal(read(soft.with_arrays(part.arrays())), read(part))


def test_permuting_the_head_but_for_its_last_token_changes_nothing() -> None:
    case = make_case("sketch", Divergence(), vocab=40, k=6)
    target = case.target
    order = np.array([3, 0, 4, 1, 2, 5])
    assert target.head_ids is not None
    assert target.head_logprobs is not None
    assert target.tail_curve is not None
    assert target.coordinates is not None
    assert target.curve is not None
    permuted = TeacherTarget.sketch(
        target.head_ids[:, mx.array(order)], target.head_logprobs[:, mx.array(order)], target.tail_curve,
        target.coordinates, curve=target.curve, bases=target.bases,
    )  # fmt: skip
    np.testing.assert_allclose(np.array(permuted.at(3.0).rows()), np.array(target.at(3.0).rows()), atol=1e-6)


def test_live_head_equals_dense_logits() -> None:
    class Head:
        weight = mx.random.normal((30, 4), key=mx.random.key(1))

        def logits(self, hidden: mx.array) -> mx.array:
            return hidden @ self.weight.T

    hidden = mx.random.normal((2, 5, 4), key=mx.random.key(2))
    live = TeacherTarget.live(hidden, Head(), vocab_size=30).at(2.0)
    dense = TeacherTarget.dense(Head().logits(hidden)).at(2.0)
    assert live.num_tokens == dense.num_tokens == 10
    assert mx.allclose(live.tokens(slice(3, 7)).rows(), dense.rows()[3:7], atol=1e-6)


def cached(
    tail: str,
    *,
    vocab: int = 50,
    k: int = 4,
    rank: int = 3,
    leading: tuple[int, ...] = (2, 3),
    margin: float = NO_CEILING,
) -> tuple:
    rng = np.random.default_rng(0)
    spec = TargetSpec(vocab, k, tail, () if tail == "none" else NODES)  # type: ignore[arg-type]
    teacher = rng.standard_normal((int(np.prod(leading)), vocab)) * 3
    ids = reference.top_k(teacher, k)
    arrays = TargetArrays(
        ids,
        np.take_along_axis(reference.log_softmax(teacher), ids, axis=-1).astype(np.float32),
        reference.tail_values(teacher, ids, spec.curve_nodes).astype(np.float32)
        if tail != "none"
        else np.zeros((len(ids), 0), np.float32),
        rng.standard_normal((len(ids), rank if tail == "sketch" else 0)).astype(np.float32),
    ).reshape(*leading)
    bases = [
        SketchBasis(
            rng.standard_normal(vocab).astype(np.float32),
            rng.standard_normal((vocab, rank)).astype(np.float32),
            1.0,
            (CoordinateGroup(0, rank, 255),),
            margin=margin,
        )
        for _ in range(3)
    ]
    return spec, arrays, bases


@pytest.mark.parametrize("tail", ["none", "bucket", "sketch"])
def test_from_arrays_of_a_batch(tail: str) -> None:
    spec, arrays, bases = cached(tail)
    target = TeacherTarget.from_arrays(arrays, spec, bases=[TailBasis.from_sketch(b) for b in bases[:1]])
    assert (target.kind, target.num_tokens, target.vocab_size) == (tail, 6, 50)
    soft = target.at(2.0)
    logprobs = soft.rows() if soft.complete else soft.events()
    np.testing.assert_allclose(np.exp(np.array(logprobs)).sum(axis=-1), 1.0, rtol=1e-5)


def test_each_token_uses_its_own_basis() -> None:
    spec, arrays, bases = cached("sketch")
    device = [TailBasis.from_sketch(b) for b in bases]
    index = np.array([[0, 1, 2], [2, 0, 1]])
    mixed = np.array(TeacherTarget.from_arrays(arrays, spec, bases=device, basis_index=index).at(2.0).rows())
    for number, basis in enumerate(device):
        alone = np.array(TeacherTarget.from_arrays(arrays, spec, bases=[basis]).at(2.0).rows())
        chosen = index.reshape(-1) == number
        np.testing.assert_allclose(mixed[chosen], alone[chosen], atol=1e-6)
        assert np.abs(mixed[~chosen] - alone[~chosen]).max() > 0.1


@settings(max_examples=20)
@given(margin=st.floats(-2.0, 4.0), vocab=st.integers(8, 400), seed=st.integers(0, 2**31))
def test_no_tail_logit_rises_above_the_ceiling(margin: float, vocab: int, seed: int) -> None:
    spec, arrays, bases = cached("sketch", vocab=vocab, margin=margin)
    rng = np.random.default_rng(seed)
    y = (rng.standard_normal((6, 3)) * 4).astype(np.float32)
    arrays = TargetArrays(*arrays.reshape(6).parts()[:3], y)
    basis = bases[0]
    soft = TeacherTarget.from_arrays(arrays, spec, bases=[TailBasis.from_sketch(basis)]).at(2.0)
    expected = reference.capped_tail(
        basis.mean.astype(np.float64), basis.components.astype(np.float64), y.astype(np.float64),
        arrays.tail_curve.astype(np.float64), nodes=NODES, at_zero=spec.curve.at_zero, margin=basis.margin,
    )  # fmt: skip
    np.testing.assert_allclose(np.array(soft.tail_logits()), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(tail_logits(basis, spec.curve, arrays), expected, rtol=1e-4, atol=1e-3)
    events = np.array(soft.events(), np.float64)
    rows = reference.sketch_logprobs(events, arrays.head_ids, expected, 2.0)
    np.testing.assert_allclose(np.array(soft.rows()), rows, rtol=1e-4, atol=2e-3)


def test_the_ceiling_cuts_only_where_there_is_one() -> None:
    spec, arrays, bases = cached("sketch", margin=1.0)
    _, _, free = cached("sketch")
    device = [TailBasis.from_sketch(b) for b in (bases[0], free[0])]
    index = np.array([[0, 1, 1], [0, 0, 1]])
    mixed = TeacherTarget.from_arrays(arrays, spec, bases=device, basis_index=index).at(2.0)
    rows = np.array(mixed.tail_logits())
    for number, basis in enumerate((bases[0], free[0])):
        alone = tail_logits(basis, spec.curve, arrays.reshape(6))
        chosen = index.reshape(-1) == number
        np.testing.assert_allclose(rows[chosen], alone[chosen], atol=1e-4)
    assert TeacherTarget.from_arrays(arrays, spec, bases=device[1:]).at(2.0).tail_ceiling is None
    cut = tail_logits(bases[0], spec.curve, arrays) < tail_logits(free[0], spec.curve, arrays)
    assert 0.01 < cut.mean() < 0.9


def test_a_smaller_vocabulary_keeps_the_ceiling() -> None:
    spec, arrays, bases = cached("sketch", margin=1.0)
    arrays = TargetArrays(arrays.head_ids % 10, *arrays.parts()[1:])
    whole = TailBasis.from_sketch(bases[0])
    full = TeacherTarget.from_arrays(arrays, spec, bases=[whole]).at(1.0).tail_logits()
    part = TeacherTarget.from_arrays(arrays, spec, bases=[whole.restricted(45)], vocab_size=45)
    np.testing.assert_allclose(np.array(part.at(1.0).tail_logits()), np.array(full)[:, :45], atol=1e-5)


@pytest.mark.parametrize("bases_used", [1, 2])
def test_the_host_back_end_cuts_as_plain_operations_do(bases_used: int) -> None:
    spec, arrays, bases = cached("sketch", margin=1.0)
    device = [TailBasis.from_sketch(b) for b in bases[:bases_used]]
    target = TeacherTarget.from_arrays(arrays, spec, bases=device, basis_index=np.arange(6) % bases_used)
    head = HeadParts(mx.random.normal((50, 8), key=mx.random.key(1)))
    hidden = mx.random.normal((6, 8), key=mx.random.key(2))
    labels, mask = mx.zeros((6,), mx.int32), mx.array([1.0, 1, 0, 1, 1, 1])
    plain, host = (
        head_loss(hidden, head, target.at(2.0), labels, mask, options=HeadOptions(backend=name)).total
        for name in ("plain", "host")
    )
    assert host.item() == pytest.approx(plain.item(), rel=1e-5)


def test_parts_that_do_not_fit_are_refused() -> None:
    spec, arrays, bases = cached("sketch")
    device = [TailBasis.from_sketch(b) for b in bases]
    with pytest.raises(IncompatibleError, match=r"bases of shape \(50, 3\).*found \[\]"):
        TeacherTarget.from_arrays(arrays, spec)
    with pytest.raises(IncompatibleError, match="and an index, if several"):
        TeacherTarget.from_arrays(arrays, spec, bases=device)
    with pytest.raises(IncompatibleError, match=r"must be \(4, 7\) as in the spec, found \(4, 0\)"):
        TeacherTarget.from_arrays(cached("none")[1], spec, bases=device[:1])
    wrong = TargetArrays(arrays.head_ids + 40, *arrays.parts()[1:])
    with pytest.raises(IncompatibleError, match="head ids must be from 0 to 49"):
        TeacherTarget.from_arrays(wrong, spec, bases=device[:1])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    case = make_case("bucket", Divergence(), vocab=40, k=6)
    with pytest.raises(UsageError, match="temperature must be a positive number"):
        case.target.at(temperature)


def test_temperature_outside_the_curve_says_what_to_do() -> None:
    case = make_case("bucket", Divergence(), vocab=40, k=6)
    with pytest.raises(UsageError, match=r"at least 0\.5, .*found 0\.25; raise .* node of 4"):
        case.target.at(0.25)

"""Prediction of sketch coordinates: its tables, its sums, its fit, its place in the sidecar."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import random_basis, random_predictor

from schemas.basis import CoordinateGroup, SketchBasis, plan_groups
from schemas.errors import CorruptionError, IncompatibleError
from schemas.predictor import SketchPredictor

GROUPS = (CoordinateGroup(0, 6, 255),)


def obvious(basis, token_ids, head_ids):
    """Predictions token by token, from the page."""
    p = basis.predictor
    unit = basis.step / 64
    components = basis.components.astype(np.float64)
    e = np.rint(components @ p.head.astype(np.float64) / unit).clip(-32767, 32767)
    f = np.rint(components @ p.token.astype(np.float64) / unit) + np.rint(
        p.constant.astype(np.float64) / unit
    )
    f = f.clip(-32767, 32767)
    rows = []
    for x, ids in zip(token_ids, head_ids, strict=True):
        total = f[x] + sum(e[i] for i in ids)
        rows.append(unit * ((total + 32768) % 65536 - 32768))
    return np.array(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 700), st.integers(1, 20), st.sampled_from([0.01, 1.0, 300.0]), st.integers(0, 10**6))
def test_predictions_are_those_of_the_page(num_tokens, k, scale, seed):
    basis = random_basis(90, groups=GROUPS, seed=seed).with_predictor(
        random_predictor(6, scale=scale, seed=seed)
    )
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, 90, num_tokens).astype(np.int32)
    head_ids = rng.integers(0, 90, (num_tokens, k)).astype(np.int32)
    got = basis.predict(token_ids, head_ids)
    expected = obvious(basis, token_ids, head_ids).reshape(num_tokens, 6)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_tables_of_a_smaller_rank_are_the_leading_columns(rank):
    basis = random_basis(90, groups=GROUPS).with_predictor(random_predictor(6))
    whole, part = basis.tables(6), basis.tables(rank)
    np.testing.assert_array_equal(part.head, whole.head[:, :rank])
    np.testing.assert_array_equal(part.token, whole.token[:, :rank])
    assert part.head.flags.c_contiguous


def test_tables_saturate_and_are_made_once():
    basis = random_basis(90, groups=GROUPS).with_predictor(random_predictor(6, scale=1e30))
    tables = basis.tables(6)
    assert set(np.unique(np.abs(tables.head))) == set(np.unique(np.abs(tables.token))) == {32767}
    assert basis.tables(6) is tables
    assert basis.with_groups((CoordinateGroup(0, 6, 3),)).tables(6) is tables
    assert random_basis(90).tables(4) is None


def test_fit_finds_a_linear_relation():
    basis = random_basis(200, groups=GROUPS, step=0.05)
    truth = random_predictor(6)
    rng = np.random.default_rng(3)
    token_ids = rng.integers(0, 200, 900).astype(np.int32)
    head_ids = rng.integers(0, 200, (900, 5)).astype(np.int32)
    y = basis.with_predictor(truth).predict(token_ids, head_ids)
    found = SketchPredictor.fit(basis.components, y, token_ids, head_ids, ridge=0.0)
    for name in ("head", "token", "constant"):
        np.testing.assert_allclose(getattr(found, name), getattr(truth, name), atol=5e-3)
    fitted = basis.with_predictor(found)
    assert (fitted.residual_spread(y, token_ids, head_ids) < 0.02 * y.std(axis=0)).all()


def test_fit_equals_ridge_regression_on_the_features():
    basis = random_basis(50, groups=GROUPS)
    rng = np.random.default_rng(1)
    token_ids = rng.integers(0, 50, 300).astype(np.int32)
    head_ids = rng.integers(0, 50, (300, 3)).astype(np.int32)
    y = rng.normal(size=(300, 6)).astype(np.float32)
    x = np.concatenate([basis.components[head_ids].sum(1), basis.components[token_ids]], 1).astype(np.float64)
    centred = x - x.mean(0)
    penalty = np.diag(0.1 * (centred**2).sum(0))
    weights = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0)))
    found = SketchPredictor.fit(basis.components, y, token_ids, head_ids, ridge=0.1)
    np.testing.assert_allclose(np.concatenate([found.head, found.token]), weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.constant, y.mean(0) - x.mean(0) @ weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_ids", [np.zeros((40, 0), np.int32), np.zeros((40, 2), np.int32)])
def test_fit_survives_features_that_say_nothing(head_ids):
    basis = random_basis(50, groups=GROUPS)
    y = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    found = SketchPredictor.fit(basis.components, y, np.zeros(40, np.int32), head_ids)
    predicted = basis.with_predictor(found).predict(np.zeros(40, np.int32), head_ids)
    np.testing.assert_allclose(predicted[0], y.mean(axis=0), atol=0.05)


def test_residuals_need_fewer_levels():
    basis = random_basis(200, groups=GROUPS, step=0.5).with_predictor(random_predictor(6, scale=3.0))
    rng = np.random.default_rng(3)
    token_ids = rng.integers(0, 200, 400).astype(np.int32)
    head_ids = rng.integers(0, 200, (400, 5)).astype(np.int32)
    y = basis.predict(token_ids, head_ids) + rng.normal(0, 0.2, (400, 6)).astype(np.float32)
    assert {g.levels for g in plan_groups(y.std(axis=0), 0.5)} > {255}
    planned = plan_groups(basis.residual_spread(y, token_ids, head_ids), 0.5)
    assert {g.levels for g in planned} == {3}


def test_a_sidecar_with_a_predictor_round_trips():
    basis = random_basis(90, groups=GROUPS).with_predictor(random_predictor(6))
    back = SketchBasis.from_bytes(basis.to_bytes(), where="x")
    for name in ("head", "token", "constant"):
        np.testing.assert_array_equal(getattr(back.predictor, name), getattr(basis.predictor, name))
    assert back.to_bytes() == basis.to_bytes()
    assert basis.with_predictor(None).to_bytes() == random_basis(90, groups=GROUPS).to_bytes()
    assert basis.truncated(3).predictor is None


def test_refuses_a_bad_predictor():
    good = random_predictor(6)
    with pytest.raises(IncompatibleError, match=r"\[r, r\], \[r, r\] and \[r\]"):
        SketchPredictor(good.head[:, :5], good.token, good.constant)
    with pytest.raises(IncompatibleError, match="finite in float32"):
        SketchPredictor(good.head, good.token * np.inf, good.constant)
    with pytest.raises(IncompatibleError, match="predictor must have rank 29, found 6"):
        random_basis(90).with_predictor(good)
    basis = random_basis(90, groups=GROUPS)
    y, ids = np.zeros((4, 6), np.float32), np.zeros((4, 2), np.int32)
    with pytest.raises(IncompatibleError, match=r"n > 0"):
        SketchPredictor.fit(basis.components, y[:0], ids[:0, 0], ids[:0])
    with pytest.raises(IncompatibleError, match="must fit coordinates"):
        SketchPredictor.fit(basis.components, y, ids[:3, 0], ids)
    with pytest.raises(IncompatibleError, match="head_ids must be from 0 to 89, found 90 to 90"):
        SketchPredictor.fit(basis.components, y, ids[:, 0], ids + 90)


def test_refuses_a_sidecar_with_part_of_a_predictor():
    basis = random_basis(90, groups=GROUPS).with_predictor(random_predictor(6))
    data = basis.to_bytes()
    for name in (b"predictor_head", b"predictor_token", b"predictor_constant"):
        with pytest.raises(CorruptionError, match=r"x: must hold tensors"):
            SketchBasis.from_bytes(data.replace(name, name.upper()), where="x")
    wrong = replace(random_predictor(6), constant=np.zeros(6, np.float32))
    damaged = bytearray(basis.with_predictor(wrong).to_bytes())
    start = damaged.find(b"\0" * 24, len(damaged) // 2)
    damaged[start : start + 24] = np.full(6, np.nan, "<f4").tobytes()
    with pytest.raises(CorruptionError, match="x: SketchPredictor: values must be finite"):
        SketchBasis.from_bytes(bytes(damaged), where="x")

"""Tail logits from a sketch against their definition in float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import random_case

from schemas.arrays import TargetArrays
from schemas.basis import NO_CEILING
from schemas.codec import decode, encode
from schemas.errors import IncompatibleError
from schemas.spec import TargetSpec
from schemas.tail import tail_ceilings, tail_logits

SPEC = TargetSpec(vocab_size=300, k=8)


def obvious(basis, nodes, at_zero, targets):
    rows = basis.mean + targets.coordinates.astype(np.float64) @ basis.components.astype(np.float64).T
    points = np.vander([0.0, *nodes])
    values = np.concatenate([np.full((len(rows), 1), at_zero), targets.tail_curve], axis=1)
    slope = np.linalg.solve(points, values.T)[-2]
    return np.minimum(rows, (rows.mean(axis=1) - slope - basis.margin)[:, None])


@settings(max_examples=15, deadline=None)
@given(st.floats(-1, 3), st.sampled_from([None, 1, 3]), st.sampled_from([None, 4, 11]), st.integers(0, 10**6))
def test_tail_logits_are_those_of_the_page(margin, k, rank, seed):
    exact, rows, codec = random_case(SPEC, seed=seed, masked=0, num_tokens=20, with_predictor=True)
    targets = decode(encode(exact, rows, codec)[0], codec, k=k, rank=rank)[1]
    basis = replace(codec.basis if rank is None else codec.basis.truncated(rank), margin=margin)
    curve = SPEC.with_k(k or SPEC.k).curve
    expected = obvious(basis, curve.nodes, curve.at_zero, targets)
    scale = np.abs(basis.mean + targets.coordinates @ basis.components.T).max()
    got = tail_logits(basis, curve, targets)
    np.testing.assert_allclose(got, expected, atol=1e-6 * scale + 1e-3)
    np.testing.assert_array_equal(got.reshape(4, 5, -1), tail_logits(basis, curve, targets.reshape(4, 5)))
    free = tail_logits(replace(basis, margin=NO_CEILING), curve, targets)
    assert (got <= free).all()
    np.testing.assert_array_equal(got, np.minimum(free, got.max(axis=1, keepdims=True)))


def test_the_ceiling_of_an_exact_sketch_is_the_smallest_head_logit():
    """With a basis that holds every logit, what the ceiling finds is z_ref, but for its margin."""
    rng = np.random.default_rng(0)
    logits = np.sort(rng.normal(0, 3, (6, 300)))[:, ::-1]
    tail = logits[:, SPEC.k :] - logits[:, SPEC.k - 1, None]
    values = np.stack([np.log(np.exp(b * tail).sum(axis=1)) for b in SPEC.curve_nodes], axis=1)
    _, _, codec = random_case(SPEC)
    basis = replace(
        codec.basis, mean=np.zeros(300), components=np.pad(logits.T / 16, ((0, 0), (0, 23))), margin=0.5
    )
    y = np.pad(16 * np.eye(6), ((0, 0), (0, 23)))
    zeros = np.zeros((6, SPEC.k))
    targets = TargetArrays(
        zeros.astype(np.int32), zeros.astype(np.float32), *(a.astype(np.float32) for a in (values, y))
    )
    found = tail_ceilings(basis, SPEC.curve, targets)
    # averages over the head as well as the tail: the mean of all logits instead of the tail's
    whole = logits.mean(axis=1) - logits[:, SPEC.k :].mean(axis=1)
    np.testing.assert_allclose(found, logits[:, SPEC.k - 1] + whole - 0.5, atol=0.01)


def test_refuses_another_rank():
    targets, _, codec = random_case(SPEC, num_tokens=4)
    with pytest.raises(IncompatibleError, match="must have the rank 5 of the basis, found 29"):
        tail_logits(codec.basis.truncated(5), SPEC.curve, targets)

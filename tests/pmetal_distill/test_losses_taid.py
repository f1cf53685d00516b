"""TAID against a direct implementation of the paper's formulas."""

import math

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.losses import HeadOptions, HeadParts, head_loss
from pmetal_distill.losses.divergences import Divergence
from pmetal_distill.losses.taid import TaidSchedule
from pmetal_distill.target import TargetKind
from schemas.errors import UsageError
from tests import reference
from tests.pmetal_distill.loss_cases import make_case


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["dense", "sketch"])
def test_loss_and_gradient_of_the_mixture(kind: TargetKind, share: float) -> None:
    temperature = 2.0
    case = make_case(kind, Divergence(), vocab=60, k=5, num_tokens=6, temperature=temperature)
    rng = np.random.default_rng(0)
    hidden, weight = (rng.standard_normal(s).astype(np.float32) for s in ((6, 4), (60, 4)))
    parts, gradient = mx.value_and_grad(
        lambda w: head_loss(
            mx.array(hidden), HeadParts(w), case.target.at(temperature), mx.array(case.labels), mx.ones(6),
            alpha=1.0, teacher_share=share, options=HeadOptions(chunk_tokens=4),
        )
    )(mx.array(weight))  # fmt: skip
    logits = hidden.astype(np.float64) @ weight.T
    mixed = reference.log_softmax(share * temperature * case.events + (1 - share) * logits, temperature)
    value, rows = reference.loss_and_gradient("forward_kl", mixed, logits, temperature, ids=None)
    assert parts.soft.item() == pytest.approx(value.mean(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(np.array(gradient), temperature**2 * rows.T @ hidden / 6, atol=1e-5)


def test_share_follows_the_paper() -> None:
    schedule, losses = TaidSchedule(rate=0.05, decay=0.9), [3.0, 2.0, 2.5, 1.0, 0.9]
    state, t, momentum = schedule.initial(), 0.4, 0.0
    assert state.t == 0.4
    for step, loss in enumerate(losses):
        state = schedule.update(state, loss, step=step, num_steps=100)
        if step > 0:
            momentum = 0.9 * momentum + 0.1 * (losses[step - 1] - loss) / losses[step - 1]
            t = max(0.4 + 0.6 * step / 100, t + 0.05 / (1 + math.exp(-momentum)) * (1 - t))
        assert state.t == pytest.approx(t, rel=1e-9)
    assert schedule.update(state, 0.5, step=100, num_steps=100).t == 1.0


def test_wrong_requests() -> None:
    case = make_case("bucket", Divergence(), vocab=60, k=5, num_tokens=6)
    arguments = (
        mx.zeros((6, 4)),
        HeadParts(mx.zeros((60, 4))),
        case.target.at(2.0),
        mx.array(case.labels),
        mx.ones(6),
    )
    with pytest.raises(UsageError, match="TAID needs the teacher's probability of every token"):
        head_loss(*arguments, teacher_share=0.5)
    with pytest.raises(UsageError, match="0 <= start < end <= 1"):
        TaidSchedule(start=1.0)

"""Measures on the device against those of NumPy; here MLX's device is the CPU."""

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.offline.calibrate import MARGINS, as_stored
from pmetal_distill.offline.capture import CoordinateMap, capture
from pmetal_distill.offline.device_fidelity import DeviceErrorMeter, meant_on_device
from pmetal_distill.offline.fidelity import ErrorMeter
from pmetal_distill.offline.sketch import Moments, fit_basis_linear, meant_tokens
from pmetal_distill.tail_basis import TailBasis
from schemas.basis import NO_CEILING
from schemas.codec import Codec
from schemas.errors import NonFiniteError
from schemas.spec import TargetSpec

VOCAB, WIDTH, RANK, TOKENS = 700, 24, 10, 300


def teacher(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and head."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(TOKENS, WIDTH)) * np.linspace(3, 0.3, WIDTH)
    return hidden.astype(np.float32), rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("margin", [NO_CEILING, 0.5])
def test_errors_are_those_of_numpy(margin: float) -> None:
    hidden, weight = teacher()
    logits = hidden @ weight.T
    spec = TargetSpec(VOCAB, 16, "sketch")
    fitted = fit_basis_linear(Moments.of(hidden, VOCAB).meaning(meant_tokens(logits)), weight, rank=RANK)
    assert isinstance(fitted.map, CoordinateMap)
    basis = fitted.basis(step=0.5, margin=margin)
    stored = as_stored(capture(logits, spec, hidden=hidden, sketch=fitted.map), Codec(spec, basis))
    exact = ErrorMeter(spec, basis)
    device = DeviceErrorMeter(spec, TailBasis.from_sketch(basis))
    assert device.result() == {}
    for rows in (slice(0, 130), slice(130, TOKENS)):
        exact.add(logits[rows], stored[rows], hidden[rows])
        device.add(mx.array(logits[rows]), stored[rows], hidden[rows])
    wanted, found = exact.result(), device.result()
    assert wanted.keys() == found.keys()
    for temperature, error in wanted.items():
        for name in ("kl", "total_variation", "gradient"):
            assert getattr(found[temperature], name) == pytest.approx(getattr(error, name), rel=1e-3)


def test_bases_of_several_margins_are_uploaded_once() -> None:
    hidden, weight = teacher()
    meant = meant_tokens(hidden @ weight.T)
    fitted = fit_basis_linear(Moments.of(hidden, VOCAB).meaning(meant), weight, rank=RANK)
    basis = fitted.basis(step=0.5)
    tails = TailBasis.with_margins(basis, MARGINS)
    coordinates, slopes = mx.array(hidden[:5, :RANK]), mx.arange(5, dtype=mx.float32)
    for margin, tail in zip(MARGINS, tails, strict=True):
        wanted = TailBasis.from_sketch(basis.with_margin(margin))
        np.testing.assert_allclose(
            np.array(tail.ceilings(coordinates, slopes)),
            np.array(wanted.ceilings(coordinates, slopes)),
            rtol=1e-6,
        )
        assert tail.components is tails[0].components


def test_meant_tokens_are_those_of_numpy() -> None:
    hidden, weight = teacher(1)
    logits = 4 * hidden @ weight.T
    np.testing.assert_allclose(meant_on_device(mx.array(logits)), meant_tokens(logits), rtol=1e-4, atol=1e-7)
    logits[7, 3] = np.nan
    with pytest.raises(NonFiniteError, match="logits must be finite"):
        meant_on_device(mx.array(logits))

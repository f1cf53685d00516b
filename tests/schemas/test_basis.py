import contextlib

import numpy as np
import pytest
import safetensors.numpy

from schemas.basis import CoordinateGroup, SketchBasis
from schemas.errors import CorruptionError, IncompatibleError

GROUPS = (CoordinateGroup(0, 2, 65536), CoordinateGroup(2, 5, 15), CoordinateGroup(5, 12, 3))


def make_basis(vocab_size=40, *, groups=GROUPS, step=0.5):
    rng = np.random.default_rng(1)
    mean = rng.normal(size=vocab_size).astype(np.float32)
    components = rng.normal(size=(vocab_size, groups[-1].stop)).astype(np.float32)
    return SketchBasis(mean, components, step, groups, {"fitted": "on noise"}, margin=0.7)


def test_round_trip_is_exact_and_deterministic():
    basis = make_basis()
    data = basis.to_bytes()
    back = SketchBasis.from_bytes(data, where="it")
    np.testing.assert_array_equal(back.mean, basis.mean)
    np.testing.assert_array_equal(back.components, basis.components)
    for name in ("step", "groups", "meta", "margin"):
        assert getattr(back, name) == getattr(basis, name)
    assert back.to_bytes() == data


def test_components_are_rounded_as_they_are_stored():
    basis = make_basis()
    np.testing.assert_array_equal(basis.components, basis.components.astype(np.float16))


def test_the_safetensors_library_reads_it():
    tensors = safetensors.numpy.load(make_basis().to_bytes())
    assert {n: a.shape for n, a in tensors.items()} == {
        "mean": (40,), "components": (40, 12), "step": (1,), "groups": (3, 3), "margin": (1,)
    }  # fmt: skip


def test_truncated_keeps_the_leading_coordinates():
    basis = make_basis()
    short = basis.truncated(4)
    np.testing.assert_array_equal(short.components, basis.components[:, :4])
    assert short.margin == basis.margin
    assert short.groups == (CoordinateGroup(0, 2, 65536), CoordinateGroup(2, 4, 15))
    with pytest.raises(IncompatibleError, match="rank must be from 1 to the stored 12, found 13"):
        basis.truncated(13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0.0}, "step must be"),
        ({"step": float("nan")}, "step must be"),
        ({"step": 1e-7}, "step must be"),
        ({"margin": float("nan")}, "margin must be finite"),
        ({"margin": 1e39}, "margin must be finite"),
        ({"groups": (CoordinateGroup(0, 11, 3),)}, "must cover 0..12"),
        ({"groups": (CoordinateGroup(1, 12, 3),)}, "must cover 0..12"),
        ({"groups": (CoordinateGroup(0, 12, 7),)}, "levels"),
        ({"mean": np.full(40, np.inf, np.float32)}, "finite"),
        ({"mean": np.zeros(39, np.float32)}, "mean \\[V\\]"),
        ({"components": np.full((40, 12), 1e6, np.float32)}, "finite"),
    ],
)
def test_refuses_a_bad_basis(change, message):
    good = make_basis()
    fields = {"mean": good.mean, "components": good.components, "step": 0.5, "groups": GROUPS} | change
    with pytest.raises(IncompatibleError, match=message):
        SketchBasis(**fields)


def test_damaged_content_never_escapes_as_another_error():
    """Even where the hash agrees (a hostile file), only CorruptionError comes out, and quickly."""
    data = make_basis().to_bytes()
    rng = np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(600):
        damaged = bytearray(data)
        for position in rng.integers(0, header, 2):
            damaged[position] = rng.integers(0, 256)
        with contextlib.suppress(CorruptionError):
            SketchBasis.from_bytes(bytes(damaged), where="x")


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"]
)
def test_refuses_other_files(data):
    with pytest.raises(CorruptionError, match=r"^x"):
        SketchBasis.from_bytes(data, where="x")

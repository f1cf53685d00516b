"""Which back end runs, and what is counted."""

import mlx.core as mx
import pytest

from pmetal_distill import kernels
from pmetal_distill.kernels import dispatch, tuning
from schemas.errors import UsageError
from tests.kernels import tools


def test_without_a_gpu_plain_operations_run() -> None:
    wanted = "plain" if mx.default_device().type != mx.DeviceType.gpu else None
    assert wanted in (None, kernels.backend())


@pytest.mark.parametrize(
    ("metal", "cuda", "wanted"), [(True, False, "metal"), (False, True, "cuda"), (False, False, "plain")]
)
def test_the_gpu_decides(monkeypatch: pytest.MonkeyPatch, metal: bool, cuda: bool, wanted: str) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.backend() == wanted
    monkeypatch.setenv(kernels.VARIABLE, "auto")
    assert kernels.backend() == wanted
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert kernels.backend() == "plain"
    assert dispatch.platform() is None


def test_an_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "metall")
    with pytest.raises(UsageError, match=r"PMETAL_KERNELS: must be 'auto' or 'plain', found 'metall'"):
        kernels.backend()


def test_launches_are_counted_and_small_inputs_padded() -> None:
    assert kernels.engaged() == {}
    with tools.emulated():
        kernels.capture(mx.zeros((2, 50)), k=3)
        kernels.capture(mx.zeros((2, 50)), k=3)
    assert kernels.engaged() == {"capture": 2}
    kernels.reset_engaged()
    assert kernels.engaged() == {}
    padded = dispatch.large_enough(mx.array([[1, 2], [3, 4]]))
    assert padded.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert dispatch.large_enough(mx.zeros((0, 3))).tolist() == [0.0] * 8
    assert dispatch.large_enough(mx.zeros((3, 3))).shape == (3, 3)


def test_a_launch_without_a_back_end_is_a_mistake() -> None:
    with pytest.raises(RuntimeError, match="no back end"):
        dispatch.launch("capture", {}, {}, template=(), groups=1, threads=32)


@pytest.mark.parametrize("vocab", [7, 500, 50_000, 151_936, 262_144, 1_000_000])
def test_launch_shapes_fit_the_device(vocab: int) -> None:
    for width in (4, 8):
        shape = tuning.shape_for("tail_sums", "cuda", length=vocab, width=width)
        assert shape.threads % 32 == 0
        assert 32 <= shape.threads <= 1024
        grain, bits = tuning.marks(vocab, width, 16)
        assert bits % 32 == 0
        assert bits * grain >= vocab + 2 * width
        assert bits // 8 <= tuning.MARKS_BYTES + 4
    assert tuning.marks(vocab, 8, 0) == (1, 32)

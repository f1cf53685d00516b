"""What kind of device MLX computes on."""

import mlx.core as mx
import pytest

from pmetal_distill.device import on_cpu, on_cuda, on_gpu


@pytest.mark.parametrize(
    ("kind", "cuda", "answers"),
    [
        (mx.cpu, False, (True, False, False)),
        (mx.cpu, True, (True, False, False)),
        (mx.gpu, False, (False, True, False)),
        (mx.gpu, True, (False, True, True)),
    ],
)
def test_the_default_device_is_asked_each_time(
    kind: mx.DeviceType, cuda: bool, answers: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)
    assert (on_cpu(), on_gpu(), on_cuda()) == answers

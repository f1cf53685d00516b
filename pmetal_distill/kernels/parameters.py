"""Run-time numbers that every row of a launch shares, as the small array that kernels take."""

import mlx.core as mx

COUNT = 8


def inverse_of(temperature: float | mx.array) -> mx.array:
    """1/T as a float32 array without axes."""
    if isinstance(temperature, mx.array):
        return 1.0 / temperature.astype(mx.float32).reshape(())
    return mx.array(1.0 / temperature, mx.float32)


def pack(temperature: float | mx.array, *others: float | mx.array) -> mx.array:
    """[1/T, others ..., 0 ...] as float32 [8]."""
    head = [inverse_of(temperature)] + [mx.array(o, mx.float32).reshape(()) for o in others]
    return mx.stack(head + [mx.zeros(())] * (COUNT - len(head)))

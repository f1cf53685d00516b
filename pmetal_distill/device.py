"""What kind of device MLX computes on by default: the CPU, a GPU, one of CUDA. Costs nothing.

Each function asks anew, so that a user or a test can switch. MLX is imported on the first question.
"""


def on_cpu() -> bool:
    """Whether it is the CPU, where work is done at once and NumPy reads the memory of MLX in place."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.cpu)


def on_gpu() -> bool:
    """Whether it is a GPU, so that work is queued and NumPy only gets results."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def on_cuda() -> bool:
    """Whether it is a GPU of CUDA, with memory of its own."""
    import mlx.core as mx

    return on_gpu() and bool(mx.cuda.is_available())

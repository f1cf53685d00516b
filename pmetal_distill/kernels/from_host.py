"""Memory of the host read by a kernel into a device array. Costs the transfer.

For CUDA: what MLX itself makes of the host's numbers is managed memory, and giving that up stops the device.
"""

import mlx.core as mx

from pmetal_distill.kernels import dispatch

THREADS = 256


def from_host(address: mx.array, offset: int, count: int) -> mx.array:
    """Queues the copy.

    Args:
        address: from `to_host.address_of`, of memory that the device can reach.
        offset: first word, counted from the address.
        count: words, a multiple of `THREADS`; the memory must hold them all.

    Returns:
        uint32 [count]. The memory is read when it is computed.
    """
    inputs = {"address": address, "offset": mx.full((dispatch.SMALLEST_ARRAY,), offset, mx.int32)}
    outputs: dispatch.Outputs = {"words": ((count,), mx.uint32)}
    return dispatch.launch(
        "from_host", inputs, outputs, template=[("TG", THREADS)], groups=count // THREADS, threads=THREADS
    )[0]

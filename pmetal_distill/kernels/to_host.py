"""A device array written straight into memory of the host by a kernel. Costs the transfer.

For CUDA: MLX itself moves what the host reads into managed memory, and that stops the device each time.
"""

import mlx.core as mx

from pmetal_distill.kernels import dispatch

THREADS = 256


def address_of(address: int) -> mx.array:
    """An address as the kernel takes it; worth keeping, as making it sends it to the device."""
    words = [address & 0xFFFFFFFF, address >> 32]
    return mx.array(words + [0] * (dispatch.SMALLEST_ARRAY - len(words)), mx.uint32)


def to_host(words: mx.array, address: mx.array) -> mx.array:
    """Queues the copy.

    Args:
        words: uint32, any shape, not empty.
        address: from `address_of`, of at least as many words that the device can reach.

    Returns:
        uint32 [8] that is computed when the words have arrived.
    """
    size = mx.full((dispatch.SMALLEST_ARRAY,), words.size, mx.int32)
    inputs = {"words": words, "address": address, "size": size}
    outputs: dispatch.Outputs = {"done": ((dispatch.SMALLEST_ARRAY,), mx.uint32)}
    groups = -(-words.size // THREADS)
    return dispatch.launch(
        "to_host", inputs, outputs, template=[("TG", THREADS)], groups=groups, threads=THREADS
    )[0]

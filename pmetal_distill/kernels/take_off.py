"""Sketch coordinates less what token ids predict of them: one read of k + 1 table rows a token.

MLX's own operations write the [n, k, r] rows that they look up, and read them again.
"""

import mlx.core as mx

from pmetal_distill.kernels import dispatch

THREADS = 128


def take_off(
    coordinates: mx.array,
    token_ids: mx.array,
    head_ids: mx.array,
    *,
    token_table: mx.array,
    head_table: mx.array,
    unit: float,
) -> mx.array:
    """coordinates - unit * wrapped(token_table[x] + sum over the head of head_table[id]), float32 [n, r].

    Args:
        coordinates: float32 [n, r].
        token_ids: int32 [n].
        head_ids: int32 [n, k].
        token_table, head_table: int16 [V, r]; their sums wrap around at 16 bits.
        unit: of the tables' entries.
    """
    n, rank = coordinates.shape
    if dispatch.platform() is None or not n or rank % 2:
        sums = head_table[head_ids].sum(axis=1) + token_table[token_ids].astype(mx.int32)
        return coordinates - sums.astype(mx.int16).astype(mx.float32) * unit
    inputs = {"y": coordinates, "tokens": token_ids, "ids": head_ids, "unit": dispatch.constants(unit)}
    inputs |= {"token_table": token_table.view(mx.int32), "head_table": head_table.view(mx.int32)}
    template = [("D", rank), ("K", head_ids.shape[1]), ("TG", THREADS)]
    outputs: dispatch.Outputs = {"left": ((n, rank), mx.float32)}
    return dispatch.launch("take_off", inputs, outputs, template=template, groups=n, threads=THREADS)[0]

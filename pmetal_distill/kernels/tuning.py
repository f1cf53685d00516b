"""Launch shapes: threads of a threadgroup, vectors in flight, cache hints.

CUDA's were measured on an H100, see `docs/kernels.md`; Metal's are a guess.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import mlx.core as mx

VECTOR_BYTES = 16
MARKS_BYTES = 24 * 1024  # of threadgroup memory for one bit a column; Apple GPUs give a threadgroup 32 KB
COARSE_GRAIN = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """How a kernel is launched.

    Attributes:
        threads: of a threadgroup, a multiple of 32.
        unroll: vectors that each thread reads before it computes.
        hint: 1 marks loads and stores as used once (CUDA).
    """

    threads: int = 512
    unroll: int = 1
    hint: int = 0


# 256 threads on Metal: kernels with many registers may not be launched with more there.
METAL_SHAPE = Shape(256, 1)
SHAPES: dict[tuple[str, str], Shape] = {
    ("tail_sums", "cuda"): Shape(512, 2),
    ("tail_sums_grad", "cuda"): Shape(512, 2),
    ("pair_sums", "cuda"): Shape(512, 1),
    ("pair_divergence", "cuda"): Shape(512, 1),
    ("pair_grad", "cuda"): Shape(512, 1),
    ("capture", "cuda"): Shape(192, 1, 1),
}
_given: ContextVar[Shape | None] = ContextVar("shape", default=None)


@contextmanager
def using(shape: Shape) -> Iterator[None]:
    """Launches every kernel in this shape inside the context."""
    token = _given.set(shape)
    try:
        yield
    finally:
        _given.reset(token)


def vector_width(dtype: mx.Dtype) -> int:
    """Elements of one 16-byte read."""
    return VECTOR_BYTES // dtype.size


def shape_for(kernel: str, platform: str, *, length: int, width: int) -> Shape:
    """The launch shape of a kernel over rows of `length`; short rows get fewer threads."""
    shape = _given.get()
    if shape is not None:
        return shape
    best = METAL_SHAPE if platform == "metal" else SHAPES.get((kernel, platform), Shape())
    useful = -(-length // (width * 32)) * 32
    return Shape(max(32, min(best.threads, useful)), best.unroll, best.hint)


def marks(length: int, width: int, k: int) -> tuple[int, int]:
    """Columns a bit and number of bits for marking `k` columns of a row."""
    if k == 0:
        return 1, 32
    needed = length + 2 * width
    grain = 1 if needed <= MARKS_BYTES * 8 else COARSE_GRAIN
    return grain, -(-needed // (grain * 32)) * 32

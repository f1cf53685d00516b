"""Random numbers that a seed decides, without touching those of the rest of the program."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """MLX's global random state starts from `seed` inside, and goes on as before outside."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    mx.random.seed(seed)
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)

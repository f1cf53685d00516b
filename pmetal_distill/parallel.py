"""Several processes on one training or one cache, through MLX's own engine (`mlx.launch`).

Without a launcher the world is one process and nothing is sent. A sum costs one all-reduce of its arrays.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from schemas.errors import PeerLostError

# What mlx.launch sets for its back ends (ring, jaccl, nccl), and what mpirun sets.
LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")

PART_BYTES = 32 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that work together.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        group: of MLX; None for one process alone.
    """

    rank: int = 0
    size: int = 1
    group: mx.distributed.Group | None = None

    @staticmethod
    def launched() -> "World":
        """The world that the launcher has made; one process if there was none.

        Raises:
            PeerLostError: the others cannot be reached.
        """
        if not any(name in os.environ for name in LAUNCHED) or _is_ring_of_one():
            return World()
        with _peers():
            group = mx.distributed.init(strict=True)
        return World(group.rank(), group.size(), group) if group.size() > 1 else World()

    @property
    def leads(self) -> bool:
        """Whether this process writes what one process must write."""
        return self.rank == 0

    def sum(self, values: mx.array) -> mx.array:
        """The sum of an array over all processes, evaluated.

        Raises:
            PeerLostError: one of the others is gone.
        """
        if self.group is None:
            return values
        mx.eval(values)
        with _peers():
            total = mx.distributed.all_sum(values, group=self.group)
            mx.eval(total)
        return total

    def sum_gradients(self, gradients: Any) -> Any:
        """The sum of a tree of gradients over all processes, evaluated; small arrays travel together.

        Raises:
            PeerLostError: one of the others is gone.
        """
        if self.group is None:
            return gradients
        summed: list[mx.array] = []
        for part in _parts(list(dict(tree_flatten(gradients)).values())):
            # Evaluated part by part: MLX's ring fails the first sum after a loss and waits for later ones.
            total = self.sum(mx.concatenate([array.reshape(-1) for array in part]))
            pieces = mx.split(total, list(accumulate(array.size for array in part))[:-1])
            summed += [piece.reshape(array.shape) for array, piece in zip(part, pieces, strict=True)]
        found = iter(summed)
        return tree_map(lambda _: next(found), gradients)

    def evaluate(self, *trees: Any) -> None:
        """Evaluates arrays that sums over all processes lead to.

        Raises:
            PeerLostError: one of the others is gone.
        """
        with _peers():
            mx.eval(*trees)

    def all(self, holds: bool) -> bool:
        """Whether something holds in every process; also waits for all of them.

        Raises:
            PeerLostError: one of the others is gone.
        """
        return self._count(holds) == self.size

    def any(self, holds: bool) -> bool:
        """Whether something holds in some process; also waits for all of them.

        Raises:
            PeerLostError: one of the others is gone.
        """
        return self._count(holds) > 0

    def together(self, act: Callable[[], T], *, otherwise: Exception) -> T:
        """Does something in every process, before any of them goes on.

        Returns:
            what `act` returned here.

        Raises:
            Exception: what `act` raised here, else `otherwise` where it failed in another process.
            PeerLostError: one of the others is gone.
        """
        try:
            result = act()
        except BaseException:
            self.all(False)
            raise
        if not self.all(True):
            raise otherwise
        return result

    def _count(self, holds: bool) -> int:
        """In how many processes it holds; alone, nothing is computed."""
        return int(holds) if self.group is None else int(self.sum(mx.array(int(holds))))


def _parts(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Arrays of one type in a row, of together at most `PART_BYTES` where there are several."""
    part: list[mx.array] = []
    num_bytes = 0
    for array in arrays:
        if part and (array.dtype != part[0].dtype or num_bytes + array.nbytes > PART_BYTES):
            yield part
            part, num_bytes = [], 0
        part.append(array)
        num_bytes += array.nbytes
    if part:
        yield part


def _is_ring_of_one() -> bool:
    """Whether the ring's host file names one process, which MLX would wait for in vain."""
    path = os.environ.get("MLX_HOSTFILE")
    if path is None:
        return False
    try:
        return len(json.loads(Path(path).read_text().strip() or "[]")) < 2
    except (OSError, ValueError):
        return False


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            f"distributed: all processes must answer, found {str(error).strip() or 'one gone'}; "
            "see why it ended, then run the same command with --resume, with any number of processes"
        ) from error

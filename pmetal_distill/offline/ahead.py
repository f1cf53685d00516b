"""Row groups loaded by a few threads before they are needed, in the order in which they will be.

Memory: `room` loaded row groups at most, those in use and those ahead together.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

_MOST_THREADS = 4

Loaded = TypeVar("Loaded")


def default_threads() -> int:
    """A thread for every two cores, at most four."""
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2))


class GroupsAhead(Generic[Loaded]):
    """Hands out row groups in an order that is known beforehand. For one thread; a context manager.

    Args:
        load: reads and decodes a row group; is called from all threads. What it raises, `take` raises.
        uses: the row groups in the order of `take`; the same one again only behind its `release` there.
        threads: that load ahead; with 0, `take` loads.
        room: row groups that may be taken or loaded ahead at once.
        keep: whether all row groups fit in, so that none need be given up.
    """

    def __init__(
        self, load: Callable[[int], Loaded], uses: Iterator[int], *, threads: int, room: int, keep: bool
    ) -> None:
        self._load = load
        self._uses = uses
        self._room = room
        self._keep = keep
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="row groups") if threads else None
        self._held: dict[int, Future[Loaded]] = {}
        self._waiting: Counter[int] = Counter()  # asked for ahead, and not yet taken
        self._outstanding = 0

    def look_ahead(self) -> None:
        """Begins to load as much as there is room for."""
        while self._pool is not None and self._outstanding < self._room:
            if (group := next(self._uses, None)) is None:
                return
            self._ask(group)

    def take(self, group: int) -> Loaded:
        """The next row group of `uses`, loaded."""
        while not self._waiting[group]:
            self._ask(next(self._uses))
        self._waiting[group] -= 1
        return self._held[group].result()

    def release(self, group: int) -> None:
        """Gives up a row group that was taken."""
        self._outstanding -= 1
        if not self._waiting[group] and not self._keep:
            del self._held[group]

    def _ask(self, group: int) -> None:
        if group not in self._held:
            self._held[group] = self._begin(group)
        self._waiting[group] += 1
        self._outstanding += 1

    def _begin(self, group: int) -> Future[Loaded]:
        if self._pool is not None:
            return self._pool.submit(self._load, group)
        done: Future[Loaded] = Future()
        done.set_result(self._load(group))
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

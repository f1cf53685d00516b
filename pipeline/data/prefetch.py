"""An iterator that runs ahead on a thread of its own. Costs the items that wait, of a bounded size."""

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition, Thread
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The items of an iterator, in order; what it raises is raised after the items before it.

    `close` must be called when no more items are wanted: it ends the thread after the item in the making.

    Args:
        items: taken on the thread, and closed there if it can be.
        most: items are made while those that wait are smaller than this in sum.
        size: of an item.
    """

    def __init__(self, items: Iterator[T], *, most: int, size: Callable[[T], int] = lambda _: 1) -> None:
        self._items, self._most, self._size = items, most, size
        self._waiting: deque[tuple[T, int]] = deque()
        self._held = 0
        self._end: BaseException | None = None
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._end is not None)
            if not self._waiting:
                assert self._end is not None
                raise self._end
            item, size = self._waiting.popleft()
            self._held -= size
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Ends the thread; items that wait are dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                if not self._keep(item):
                    break
        except BaseException as error:  # noqa: BLE001 - raised where the items are taken
            end = error
        finally:
            if (close := getattr(self._items, "close", None)) is not None:
                close()
        with self._changed:
            self._end = end
            self._changed.notify_all()

    def _keep(self, item: T) -> bool:
        """Waits for room; False if nobody wants the item any more."""
        size = self._size(item)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._held < self._most)
            if not self._closed:
                self._waiting.append((item, size))
                self._held += size
                self._changed.notify_all()
            return not self._closed

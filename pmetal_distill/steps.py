"""Work in steps: generators that pause while a device computes, so that the caller can give it more to do.

What is queued behind a result keeps the device busy while the host waits for that result and works on it.
"""

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Steps = Generator[Any, None, T]


class Underway(Generic[T]):
    """Work that is done a step at a time.

    Args:
        steps: pauses by yielding, and returns the result. What it yields is None, or what it waits for.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self._steps: Steps[T] | None = steps
        self._waits_for: Future[Any] | None = None
        self._found: list[T] = []

    def step(self) -> bool:
        """Goes on to the next pause or the end; whether there is more to do. Raises what the work raises."""
        if self._steps is None:
            return False
        try:
            self._waits_for = next(self._steps)
        except StopIteration as end:
            self._steps = None
            self._found.append(end.value)
        return self._steps is not None

    def result(self) -> T:
        """All of it, without pauses."""
        while self.step():
            if self._waits_for is not None:
                wait([self._waits_for])
        return self._found[0]


def finish(steps: Steps[T]) -> T:
    """The result of steps, without pauses."""
    return Underway(steps).result()


def beside(work: Callable[[], T]) -> Steps[T]:
    """Does work in which MLX has no part on a thread; pauses until it is done."""
    with ThreadPoolExecutor(1, "beside") as pool:
        future = pool.submit(work)
        while not future.done():
            yield future
        return future.result()


def at_once(work: Callable[[], T]) -> Steps[T]:
    """As `beside`, but done before it returns."""
    yield from ()
    return work()

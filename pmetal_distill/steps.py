"""Work in steps: generators that pause while a device computes, so that the caller can give it more to do.

What is queued behind a result keeps the device busy while the host waits for that result and works on it.
"""

from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


class Underway(Generic[T]):
    """Work that is done a step at a time.

    Args:
        steps: pauses by yielding, and returns the result.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self._steps: Steps[T] | None = steps
        self._found: list[T] = []

    def step(self) -> bool:
        """Goes on to the next pause or the end; whether there is more to do. Raises what the work raises."""
        if self._steps is None:
            return False
        try:
            next(self._steps)
        except StopIteration as end:
            self._steps = None
            self._found.append(end.value)
        return self._steps is not None

    def result(self) -> T:
        """All of it, without pauses."""
        while self.step():
            pass
        return self._found[0]


def finish(steps: Steps[T]) -> T:
    """The result of steps, without pauses."""
    return Underway(steps).result()

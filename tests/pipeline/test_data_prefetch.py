"""An iterator on a thread: order, errors in their place, a bound, an end."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.data.prefetch import Prefetch


def numbers(count: int, made: list[int], *, fail: bool = False) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number
    if fail:
        raise ValueError("no more")


def settled(made: list[int]) -> list[int]:
    """What has been made when nothing has been for a while."""
    before = -1
    while len(made) != before:
        before = len(made)
        time.sleep(0.05)
    return made


def test_items_come_in_order_and_errors_after_them() -> None:
    with closing(Prefetch(numbers(20, []), most=3)) as found:
        assert list(found) == list(range(20))
        assert list(found) == []
    with closing(Prefetch(numbers(3, [], fail=True), most=9)) as found:
        assert [next(found) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(ValueError, match="no more"):
                next(found)


def test_no_more_is_made_than_has_room() -> None:
    made: list[int] = []
    with closing(Prefetch(numbers(99, made), most=20, size=lambda number: 10)) as found:
        assert len(settled(made)) == 3  # two wait, one waits for room
        assert next(found) == 0
        assert len(settled(made)) == 4


def test_an_item_larger_than_the_room_comes_alone() -> None:
    with closing(Prefetch(numbers(5, []), most=1, size=lambda number: 1000)) as found:
        assert list(found) == [0, 1, 2, 3, 4]


def test_closing_ends_the_thread_and_the_iterator() -> None:
    made: list[int] = []
    ended: list[bool] = []

    def endless() -> Iterator[int]:
        try:
            yield from numbers(10**9, made)
        finally:
            ended.append(True)

    found = Prefetch(endless(), most=2)
    next(found)
    found.close()
    assert ended == [True]
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    assert list(found) == []

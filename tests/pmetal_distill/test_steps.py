"""Work in steps."""

import threading
import time
from collections.abc import Generator

import pytest

from pmetal_distill.steps import Underway, at_once, beside, finish


def _count(pauses: int, said: list[int]) -> Generator[None, None, str]:
    for number in range(pauses):
        said.append(number)
        yield
    return f"{pauses} pauses"


def test_steps_are_done_one_by_one_and_once() -> None:
    said: list[int] = []
    work = Underway(_count(3, said))
    assert said == []
    assert work.step()
    assert said == [0]
    assert work.result() == "3 pauses"
    assert not work.step()
    assert work.result() == "3 pauses"
    assert said == [0, 1, 2]
    assert finish(_count(0, said)) == "0 pauses"


def test_what_the_work_raises_comes_out_at_the_step() -> None:
    def broken() -> Generator[None, None, None]:
        yield
        raise OSError("no more")

    work = Underway(broken())
    assert work.step()
    with pytest.raises(OSError, match="no more"):
        work.step()


def test_work_beside_the_caller_pauses_it_and_is_waited_for_without_spinning() -> None:
    going = threading.Event()

    def slow() -> str:
        going.wait(10)
        return threading.current_thread().name

    work = Underway(beside(slow))
    assert work.step()
    assert work.step()
    threading.Timer(0.3, going.set).start()
    start = time.thread_time()
    assert work.result().startswith("beside")
    assert time.thread_time() - start < 0.1
    assert finish(at_once(slow)) == "MainThread"

    def broken() -> None:
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        finish(beside(broken))

"""Work in steps."""

from collections.abc import Generator

import pytest

from pmetal_distill.steps import Underway, finish


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

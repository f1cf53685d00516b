"""Ticks are round, cover the data and are few; numbers are short."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.axes import Axis, scale_of
from pipeline.reporting.numbers import file_size, linear_ticks, log_ticks, short, tick_labels

FINITE = st.floats(-1e9, 1e9, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-9)


@given(FINITE, st.floats(1e-6, 1e9), st.integers(2, 8))
def test_linear_ticks_cover_the_range_in_equal_steps(low: float, size: float, most: int) -> None:
    high = low + size
    if high - low < 1e-9 * abs(low):
        return
    ticks = linear_ticks(low, high, most=most)
    slack = 1e-6 * (high - low)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= most + 2
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    digits = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(digits - wanted) for wanted in (1, 2, 2.5, 5, 10)) < 1e-3


@given(st.floats(1e-6, 1e6), st.floats(2, 1e9), st.integers(3, 8))
def test_log_ticks_cover_the_range(low: float, ratio: float, most: int) -> None:
    ticks = log_ticks(low, low * ratio, most=most)
    assert ticks[0] <= low * (1 + 1e-6)
    assert ticks[-1] >= low * ratio * (1 - 1e-6)
    assert 2 <= len(ticks) <= most + 2
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 12345])
def test_whole_ticks_are_whole(count: int) -> None:
    assert all(tick == round(tick) for tick in linear_ticks(0, count, most=5, whole=True))


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 5, 10], ["0", "5", "10"]),
        ([0, 2e-4, 4e-4], ["0", "2e-4", "4e-4"]),
        ([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"]),
        ([0, 10000, 20000], ["0", "10,000", "20,000"]),
    ],
)
def test_labels_of_ticks(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0091, "0.0091"), (2.5376, "2.538"), (1234.5, "1,234"), (6e-4, "6e-4"), (-3e9, "-3e9")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_sizes_of_files() -> None:
    assert [file_size(n) for n in (12, 1234, 26_086_448, 3e9)] == ["12 B", "1.23 kB", "26.1 MB", "3 GB"]


class TestScale:
    def test_ends_and_middle(self) -> None:
        scale = scale_of(Axis("x"), [0.0, 10.0], start=100, stop=300, most=5)
        assert (scale(0), scale(5), scale(10)) == (100, 200, 300)

    def test_logarithms(self) -> None:
        scale = scale_of(Axis("x", log=True), [0.01, 100.0], start=0, stop=400, most=5)
        assert [scale(v) for v in (0.01, 0.1, 1, 10, 100)] == pytest.approx([0, 100, 200, 300, 400])

    @pytest.mark.parametrize("axis", [Axis("x"), Axis("x", log=True), Axis("x", whole=True)])
    @pytest.mark.parametrize("value", [1e-5, 1.0, 7.0, 1e6])
    def test_a_single_value_has_a_place(self, axis: Axis, value: float) -> None:
        scale = scale_of(axis, [value], start=0, stop=100, most=4)
        assert 0 <= scale(value) <= 100
        assert scale.low < scale.high

    def test_zero_alone(self) -> None:
        scale = scale_of(Axis("x"), [0.0], start=0, stop=100, most=4)
        assert scale(0) == 0

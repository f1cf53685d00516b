"""Schedules: values at chosen steps, the phases, what is refused."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmetal_distill.schedule import KINDS, AlphaSchedule, Schedule, TemperatureSchedule
from schemas.errors import UsageError


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (TemperatureSchedule.constant(2.0), {0: 2.0, 10**9: 2.0}),
        (
            TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000),
            {0: 4.0, 500: 2.5, 1000: 1.0, 10**6: 1.0},
        ),
        (TemperatureSchedule.cosine(start=4.0, end=1.0, steps=8), {0: 4.0, 4: 2.5, 8: 1.0, 9: 1.0}),
        (
            TemperatureSchedule.exponential(start=8.0, end=1.0, steps=3),
            {0: 8.0, 1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0},
        ),
        (
            TemperatureSchedule.step(start=4.0, end=1.0, steps=9, stages=3),
            {0: 4.0, 2: 4.0, 3: 3.0, 5: 3.0, 6: 2.0, 8: 2.0, 9: 1.0, 10: 1.0},
        ),
        (
            AlphaSchedule.linear(start=1.0, end=0.0, steps=10, warmup=4, hold=3, warmup_start=0.2),
            {0: 0.2, 2: 0.6, 4: 1.0, 7: 1.0, 12: 0.5, 17: 0.0, 18: 0.0},
        ),
        (AlphaSchedule.constant(0.8, warmup=4, warmup_start=0.0), {0: 0.0, 1: 0.2, 4: 0.8, 99: 0.8}),
        (TemperatureSchedule.linear(start=3.0, end=1.0, steps=2, warmup=5), {0: 3.0, 4: 3.0, 6: 2.0, 7: 1.0}),
    ],
)
def test_values(schedule: Schedule, values: dict[int, float]) -> None:
    for step, expected in values.items():
        assert schedule(step) == pytest.approx(expected, abs=1e-12), step


@given(
    kind=st.sampled_from(KINDS),
    start=st.floats(0.5, 8),
    end=st.floats(0.5, 8),
    steps=st.integers(1, 50),
    warmup=st.integers(0, 9),
    hold=st.integers(0, 9),
)
def test_values_stay_between_the_ends_and_end_at_the_end(
    kind: str, start: float, end: float, steps: int, warmup: int, hold: int
) -> None:
    schedule = TemperatureSchedule(kind, start, end, steps, warmup, hold)  # type: ignore[arg-type]
    values = [schedule(step) for step in range(warmup + hold + steps + 2)]
    low, high = min(start, end), max(start, end)
    assert all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    differences = [b - a for a, b in itertools.pairwise(values)]
    assert all(d * (end - start) >= -1e-9 for d in differences)
    assert values[-1] == (start if kind == "constant" else end)
    assert TemperatureSchedule.from_dict(schedule.to_dict()) == schedule


def test_written_form_is_short() -> None:
    schedule = TemperatureSchedule.linear(start=4.0, end=1.0, steps=1000)
    assert schedule.to_dict() == {"kind": "linear", "start": 4.0, "end": 1.0, "steps": 1000}


def test_cosine_is_half_a_wave() -> None:
    schedule = AlphaSchedule.cosine(start=1.0, end=0.0, steps=100)
    assert schedule(25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))


def test_bad_schedules_say_what_must_hold() -> None:
    with pytest.raises(UsageError, match=r"temperature schedule: end must be positive, found 0\.0"):
        TemperatureSchedule.linear(start=4.0, end=0.0, steps=10)
    with pytest.raises(UsageError, match=r"alpha schedule: start must be from 0 to 1, found 1\.5"):
        AlphaSchedule.constant(1.5)
    with pytest.raises(UsageError, match="steps must be at least 1, found 0"):
        TemperatureSchedule.cosine(start=4.0, end=1.0, steps=0)
    with pytest.raises(UsageError, match="positive in an exponential schedule"):
        AlphaSchedule.exponential(start=1.0, end=0.0, steps=10)
    with pytest.raises(UsageError, match="stages must be from 1 to steps=4, found 5"):
        TemperatureSchedule.step(start=4.0, end=1.0, steps=4, stages=5)
    with pytest.raises(UsageError, match="warmup must be a whole number"):
        TemperatureSchedule.linear(start=4.0, end=1.0, steps=4, warmup=-1)
    with pytest.raises(UsageError, match="kind must be one of constant"):
        TemperatureSchedule.from_dict({"kind": "square", "start": 1.0, "end": 2.0})
    with pytest.raises(UsageError, match=r"keys must be among .*found \['stepz'\]"):
        TemperatureSchedule.from_dict({"kind": "linear", "start": 1.0, "end": 2.0, "stepz": 3})
    with pytest.raises(UsageError, match=r"missing \['end'\]"):
        TemperatureSchedule.from_dict({"kind": "linear", "start": 1.0})
    with pytest.raises(UsageError, match="start must be a number, found '4'"):
        TemperatureSchedule.from_dict({"kind": "linear", "start": "4", "end": 1.0, "steps": 3})
    with pytest.raises(ValueError, match="step must be at least 0, found -1"):
        TemperatureSchedule.constant(2.0)(-1)

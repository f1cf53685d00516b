"""Axes of a chart: from values to places, with ticks, grid lines and labels. Costs nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import linear_ticks, log_ticks, text_width, tick_labels

TICK_SIZE = 11.5
LABEL_SIZE = 12.0
TOP, BOTTOM = 30.0, 42.0


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: quantity and unit.
        log: logarithmic; all values must be positive.
        from_zero: the axis includes 0.
        whole: ticks at whole numbers only.
        ticks: these ticks instead of round numbers; the axis ends at the first and last.
        tight: the axis ends at the data, not at the next tick.
    """

    label: str
    log: bool = False
    from_zero: bool = False
    whole: bool = False
    ticks: tuple[float, ...] = ()
    tight: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis with its place on the chart.

    Attributes:
        low, high: values at both ends.
        start, stop: places of these, in units of the view box.
        log: logarithmic.
        ticks, labels: where ticks stand, and what is written there.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (at - low) / (high - low)

    def moved(self, start: float, stop: float) -> "Scale":
        """The same axis elsewhere."""
        return Scale(self.low, self.high, start, stop, self.log, self.ticks, self.labels)


def scale_of(axis: Axis, values: Sequence[float], *, start: float, stop: float, most: int) -> Scale:
    """The scale of an axis for data.

    Args:
        axis: what it shows.
        values: finite; at least one.
        start, stop: places of its ends.
        most: about how many ticks fit.
    """
    low, high = _room(axis, min(values), max(values))
    if axis.ticks:
        ticks = list(axis.ticks)
    elif axis.log:
        ticks = log_ticks(low, high, most=most)
    else:
        ticks = linear_ticks(low, high, most=most, whole=axis.whole)
    if not axis.tight:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    inside = tuple(t for t in ticks if low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high))
    return Scale(low, high, start, stop, axis.log, inside, tuple(tick_labels(inside)))


def _room(axis: Axis, low: float, high: float) -> tuple[float, float]:
    """The range of the data, widened where it is a single value."""
    if axis.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high > low:
        return low, high
    if axis.log:
        return low / 2, high * 2
    if axis.whole:
        return low - 1, high + 1
    return (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)


def left_margin(y: Scale) -> float:
    """Width of the labels of a vertical axis with their gap."""
    return max(text_width(label, TICK_SIZE) for label in y.labels) + 10


def draw_axes(x: Scale, y: Scale, *, x_label: str, y_label: str) -> list[Element]:
    """Grid lines, ticks and labels; the vertical axis is named above it, left, the horizontal one below."""
    right, floor = x.stop, y.start
    parts = []
    for value, label in zip(y.ticks, y.labels, strict=True):
        at = y(value)
        parts.append(
            tag("line", class_="grid", x1=place(x.start), x2=place(right), y1=place(at), y2=place(at))
        )
        parts.append(_word(label, x.start - 8, at + 4, "tick", "end"))
    for value, label in _spaced(x):
        at = x(value)
        parts.append(
            tag("line", class_="axis", x1=place(at), x2=place(at), y1=place(floor), y2=place(floor + 4))
        )
        parts.append(_word(label, at, floor + 17, "tick", "middle"))
    parts.append(
        tag("line", class_="axis", x1=place(x.start), x2=place(right), y1=place(floor), y2=place(floor))
    )
    parts.append(_word(y_label, 0, 13, "label", "start"))
    parts.append(_word(x_label, (x.start + right) / 2, floor + 35, "label", "middle"))
    return parts


def _spaced(x: Scale) -> list[tuple[float, str]]:
    """Ticks whose labels do not touch; the first always stands."""
    shown: list[tuple[float, str]] = []
    edge = -math.inf
    for value, label in zip(x.ticks, x.labels, strict=True):
        half = text_width(label, TICK_SIZE) / 2
        if x(value) - half >= edge:
            shown.append((value, label))
            edge = x(value) + half + 8
    return shown


def _word(text: str, x: float, y: float, kind: str, anchor: str) -> Element:
    return tag("text", text, class_=kind, x=place(x), y=place(y), text_anchor=anchor)


def place(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")

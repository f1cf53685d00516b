"""Horizontal bars with their values. Costs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.axes import LABEL_SIZE, place
from pipeline.reporting.lines import WIDTH
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import text_width

ROW, THICK = 24.0, 13.0
_LONGEST = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """A named amount of at least 0; `tip` is said under the pointer."""

    name: str
    value: float
    tip: str = ""


def bar_height(bars: Sequence[Bar]) -> float:
    """Height of the chart."""
    return ROW * len(bars) + 8


def bar_chart(bars: Sequence[Bar], *, width: float = WIDTH) -> list[Element]:
    """The content of an SVG of `width` x `bar_height(bars)`; the longest bar takes all the room there is.

    Args:
        bars: at least one.
        width: of the view box.
    """
    names = [bar.name if len(bar.name) <= _LONGEST else bar.name[: _LONGEST - 1] + "…" for bar in bars]
    left = max(text_width(name, LABEL_SIZE) for name in names) + 10
    values = [f"{bar.value:,.2f}" for bar in bars]
    room = width - left - max(text_width(value, LABEL_SIZE) for value in values) - 10
    largest = max(bar.value for bar in bars) or 1.0
    parts = [tag("line", class_="axis", x1=place(left), x2=place(left), y1=0, y2=place(bar_height(bars)))]
    for number, (bar, name, value) in enumerate(zip(bars, names, values, strict=True)):
        top, long = 4 + ROW * number, room * bar.value / largest
        middle = place(top + ROW / 2 + 4)
        parts += [
            tag("text", name, class_="tick", x=place(left - 8), y=middle, text_anchor="end"),
            tag(
                "rect",
                class_="bar s0",
                x=place(left),
                y=place(top + (ROW - THICK) / 2),
                width=place(max(long, 0.5)),
                height=THICK,
                data_tip=bar.tip or None,
            ),
            tag("text", value, class_="tick", x=place(left + long + 7), y=middle),
        ]
    return parts

"""Figures: a chart with a title, a description and its numbers, for the page or as a file of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from pipeline.reporting.axes import Axis, place
from pipeline.reporting.bars import Bar, bar_chart, bar_height
from pipeline.reporting.lines import HEIGHT, WIDTH, Series, line_chart
from pipeline.reporting.markup import Element, Raw, tag
from pipeline.reporting.numbers import short

_MOST_ROWS = 400
_PAD, _HEADING = 16.0, 30.0


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts and numbers under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def element(self) -> Element:
        """The table, which scrolls sideways where it is too wide."""
        head = tag("tr", [tag("th", cell, scope="col") for cell in self.header])
        body = [
            tag("tr", tag("th", _cell(row[0]), scope="row"), [tag("td", _cell(cell)) for cell in row[1:]])
            for row in self.rows
        ]
        return tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", body)),
            class_="scroll",
            tabindex=0,
            role="group",
            aria_label="table",
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart.

    Attributes:
        name: of its file, without suffix.
        title: what it shows, in a few words.
        description: what can be seen in it, for those who cannot see it.
        content: elements of the SVG.
        width, height: of the view box.
        table: the same as numbers.
        note: a remark below, or nothing.
    """

    name: str
    title: str
    description: str
    content: Sequence[Element]
    width: float
    height: float
    table: Table
    note: str = ""

    def element(self) -> Element:
        """The figure as part of a page."""
        return tag(
            "figure",
            tag("h3", self.title),
            self._svg(self.content, self.width, self.height),
            tag("figcaption", self.note) if self.note else None,
            tag("details", tag("summary", "Numbers"), self.table.element()),
        )

    @property
    def file_size(self) -> tuple[int, int]:
        """Width and height of the file's picture."""
        return math.ceil(self.width + 2 * _PAD), math.ceil(self.height + _HEADING + 2 * _PAD)

    def file(self) -> str:
        """An SVG file that looks the same alone, in light and in dark surroundings."""
        moved = tag("g", *self.content, transform=f"translate({place(_PAD)} {place(_HEADING + _PAD)})")
        width, height = self.file_size
        heading = tag("text", self.title, class_="heading", x=_PAD, y=_PAD + 13)
        paper = tag("rect", class_="paper", width=place(width), height=place(height))
        style = tag("style", Raw(asset("chart.css")))
        return self._svg([style, paper, heading, moved], width, height, alone=True).render() + "\n"

    def _svg(
        self, content: Sequence[Element], width: float, height: float, *, alone: bool = False
    ) -> Element:
        title, description = f"{self.name}-title", f"{self.name}-desc"
        size = {"width": place(width), "height": place(height)} if alone else {}
        return tag(
            "svg",
            tag("title", self.title, id=title),
            tag("desc", self.description, id=description),
            content,
            class_="chart",
            viewBox=f"0 0 {place(width)} {place(height)}",
            role="img",
            aria_labelledby=title,
            aria_describedby=description,
            xmlns="http://www.w3.org/2000/svg",
            **size,
        )


def line_figure(
    name: str,
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    description: str,
    note: str = "",
    width: float = WIDTH,
    height: float = HEIGHT,
) -> Figure:
    """A figure of lines or points; see `line_chart`."""
    content = line_chart(series, x, y, width=width, height=height)
    table = _series_table(series, x, y)
    return Figure(name, title, description, content, width, height, table, note)


def bar_figure(
    name: str, title: str, bars: Sequence[Bar], *, unit: str, description: str, note: str = ""
) -> Figure:
    """A figure of horizontal bars; see `bar_chart`."""
    table = Table(["", unit], [[bar.name, bar.value] for bar in bars])
    return Figure(name, title, description, bar_chart(bars), WIDTH, bar_height(bars), table, note)


def asset(name: str) -> str:
    """A style sheet or script of the page."""
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _series_table(series: Sequence[Series], x: Axis, y: Axis) -> Table:
    """One row an x, one column a series; thinned where it would be very long."""
    shown = [s for s in series if not s.plain and s.points]
    columns = [dict(s.points) for s in shown]
    marks = sorted({a for column in columns for a in column})
    marks = marks[:: max(1, -(-len(marks) // _MOST_ROWS))]
    names = [s.name for s in shown] if len(shown) > 1 else [y.label]
    return Table([x.label, *names], [[a, *(column.get(a, "") for column in columns)] for a in marks])


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

"""Line and point charts. Series differ by dash, marker and a label of their own, not by colour alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.reporting.axes import (
    BOTTOM,
    LABEL_SIZE,
    TOP,
    Axis,
    Scale,
    draw_axes,
    left_margin,
    place,
    scale_of,
)
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import short, text_width

WIDTH, HEIGHT = 380.0, 262.0
COLOURS = 6
_DASHES = (None, "7 3", "2.5 2.5", "9 3 2 3", "5 2 1 2 1 2", "12 4")
_MOST_MARKERS = 40
_MOST_TIPS = 60
_LINE = 14.5
_NEAR, _BOLD, _PLOT = 0.85, 1.1, 0.6

Point = tuple[float, float]
Placed = tuple[float, float, int]


@dataclass(frozen=True, slots=True)
class Series:
    """Points with a name.

    Attributes:
        name: short, written at the last point.
        points: x ascending.
        band: lower and upper bound at every point, or none.
        joined: draw a line through them.
        plain: a line to compare with: no markers, muted.
        notes: a few words above every point, "" for none.
    """

    name: str
    points: Sequence[Point]
    band: Sequence[Point] = ()
    joined: bool = True
    plain: bool = False
    notes: Sequence[str] = ()

    def finite(self) -> "Series":
        """Without points that are no numbers."""
        kept = [i for i, point in enumerate(self.points) if all(map(math.isfinite, point))]
        return replace(
            self,
            points=[self.points[i] for i in kept],
            band=[self.band[i] for i in kept] if self.band else (),
            notes=[self.notes[i] for i in kept] if self.notes else (),
        )


def line_chart(
    series: Sequence[Series], x: Axis, y: Axis, *, width: float = WIDTH, height: float = HEIGHT
) -> list[Element]:
    """The content of an SVG of `width` x `height`.

    Args:
        series: at least one point in all; on logarithmic axes values above 0.
        x, y: what the axes show.
        width, height: of the view box.
    """
    shown = [s.finite() for s in series if s.finite().points]
    across = scale_of(
        x, [p[0] for s in shown for p in s.points], start=0, stop=1, most=max(2, int(width / 70))
    )
    heights = [v for s in shown for p, b in _with_bands(s) for v in (p[1], *b)]
    up = scale_of(y, heights, start=height - BOTTOM, stop=TOP, most=max(2, int(height / 55)))
    named = len(shown) > 1
    across = across.moved(
        left_margin(up), width - _right_margin(shown, across, width) if named else width - 14
    )
    parts: list[Element] = draw_axes(across, up, x_label=x.label, y_label=y.label)
    for number, one in enumerate(shown):
        parts += _draw(one, _style(shown, number), across, up)
    if named:
        parts += _names(shown, across, up)
    for one in shown:
        parts += _tips(one, across, up, x, named=named)
    return parts


def _right_margin(series: Sequence[Series], x: Scale, width: float) -> float:
    """Room for names, which begin at the right edge or behind a last point that is far from it."""
    return max(
        14.0,
        *(
            _name_width(s) + 12 - (0 if _at_edge(s, x) else (1 - x(s.points[-1][0])) * _PLOT * width)
            for s in series
        ),
    )


def _name_width(series: Series) -> float:
    return _BOLD * text_width(series.name, LABEL_SIZE)


def _at_edge(series: Series, x: Scale) -> bool:
    """Whether a line ends so near the right edge that its name stands outside."""
    share = (x(series.points[-1][0]) - x.start) / (x.stop - x.start)
    return series.joined and share > _NEAR


def _with_bands(series: Series) -> list[tuple[Point, tuple[float, ...]]]:
    bands: Sequence[tuple[float, ...]] = series.band or [()] * len(series.points)
    return list(zip(series.points, bands, strict=True))


def _style(series: Sequence[Series], number: int) -> int:
    """Which colour, dash and marker: plain series take none away."""
    return sum(not s.plain for s in series[:number])


def _draw(series: Series, style: int, x: Scale, y: Scale) -> list[Element]:
    colour = "plain" if series.plain else f"s{style % COLOURS}"
    spots = [(x(a), y(b)) for a, b in series.points]
    parts = []
    if series.band:
        edges = [(x(p[0]), y(hi)) for p, (_, hi) in zip(series.points, series.band, strict=True)]
        edges += [(x(p[0]), y(lo)) for p, (lo, _) in zip(series.points, series.band, strict=True)][::-1]
        parts.append(tag("polygon", class_=f"band {colour}", points=_path(edges)))
    if series.joined and len(spots) > 1:
        dash = "4 3" if series.plain else _DASHES[style % len(_DASHES)]
        parts.append(tag("polyline", class_=f"line {colour}", points=_path(spots), stroke_dasharray=dash))
    if not series.plain and len(spots) <= _MOST_MARKERS:
        parts += [_marker(style, *spot, colour) for spot in spots]
    for note, (a, b) in zip(series.notes, spots, strict=False):
        parts += [_note(note, a, b, colour)] if note else []
    return parts


def _note(text: str, a: float, b: float, colour: str) -> Element:
    """Words above a point."""
    return tag("text", text, class_=f"name {colour}", x=place(a), y=place(b - 9), text_anchor="middle")


def _marker(style: int, a: float, b: float, colour: str) -> Element:
    """Circle, square, triangle, diamond, cross, ring."""
    kind, name = style % 6, f"mark {colour}"
    if kind in (0, 5):
        return tag("circle", class_=name + (" ring" if kind == 5 else ""), cx=place(a), cy=place(b), r=3.2)
    corners = {
        1: ((-3, -3), (3, -3), (3, 3), (-3, 3)),
        2: ((0, -4), (3.8, 3), (-3.8, 3)),
        3: ((0, -4.4), (4.4, 0), (0, 4.4), (-4.4, 0)),
        4: ((-4, -4), (0, -1.2), (4, -4), (1.2, 0), (4, 4), (0, 1.2), (-4, 4), (-1.2, 0)),
    }[kind]
    return tag("polygon", class_=name, points=_path([(a + i, b + j) for i, j in corners]))


def _names(series: Sequence[Series], x: Scale, y: Scale) -> list[Element]:
    """Each name right of its last point; moved where names would touch."""
    edge = [(y(s.points[-1][1]), n) for n, s in enumerate(series) if _at_edge(s, x)]
    placed = [(x.stop, *spot) for spot in _apart(edge, low=TOP, high=y.start + 4)]
    for number, one in enumerate(series):
        if not _at_edge(one, x):
            across = x(one.points[-1][0])
            down = _nearest_free(one, across, placed, series, y)
            placed.append((across, down, number))
    parts = []
    for across, down, number in placed:
        colour = "plain" if series[number].plain else f"s{_style(series, number) % COLOURS}"
        at = {"x": place(across + 8), "y": place(down + 4)}
        parts.append(tag("text", series[number].name, class_=f"name {colour}", **at))
    return parts


def _nearest_free(
    one: Series, across: float, placed: Sequence[Placed], series: Sequence[Series], y: Scale
) -> float:
    """The height nearest to the last point where a name touches no other and not the axis."""
    wanted, wide = y(one.points[-1][1]), _name_width(one)
    for step in range(round(y.start - TOP)):
        for down in (wanted + step, wanted - step):
            inside = TOP <= down <= y.start - 3
            if inside and not any(_touch(across, down, wide, other, series) for other in placed):
                return down
    return wanted


def _touch(across: float, down: float, wide: float, other: Placed, series: Sequence[Series]) -> bool:
    there, height, number = other
    return (
        abs(height - down) < _LINE and across < there + _name_width(series[number]) and there < across + wide
    )


def _apart(wanted: Sequence[tuple[float, int]], *, low: float, high: float) -> list[tuple[float, int]]:
    """The same places, at least a line from each other, between `low` and `high`."""
    placed: list[tuple[float, int]] = []
    for at, number in sorted(wanted):
        placed.append((max(at, placed[-1][0] + _LINE if placed else low), number))
    limit = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = (min(placed[i][0], limit), placed[i][1])
        limit = placed[i][0] - _LINE
    return placed


def _tips(series: Series, x: Scale, y: Scale, axis: Axis, *, named: bool) -> list[Element]:
    """Invisible spots that show the figures under the pointer."""
    if series.plain:
        return []
    step = -(-len(series.points) // _MOST_TIPS)
    return [
        tag(
            "circle",
            class_="hit",
            cx=place(x(a)),
            cy=place(y(b)),
            r=9,
            data_tip=f"{series.name + ': ' if named else ''}{short(b)} at {axis.label} {short(a)}",
        )
        for a, b in series.points[::step]
    ]


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{place(a)},{place(b)}" for a, b in points)

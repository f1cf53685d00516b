"""Charts put points where their values are, keep labels apart, and leave nothing out."""

import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reporting.axes import Axis
from pipeline.reporting.bars import Bar, bar_chart
from pipeline.reporting.figures import bar_figure, line_figure
from pipeline.reporting.lines import HEIGHT, WIDTH, Series, line_chart
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import text_width

VALUES = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-6)


def tree(content: Sequence[Element]) -> ElementTree.Element:
    return ElementTree.fromstring(tag("g", content).render())


def spots(content: Sequence[Element], kind: str) -> list[tuple[float, float]]:
    """Places of the circles of a class."""
    return [
        (float(c.attrib["cx"]), float(c.attrib["cy"]))
        for c in tree(content).iter("circle")
        if kind in c.attrib["class"].split()
    ]


def words(content: Sequence[Element]) -> list[tuple[str, float, float, float]]:
    """Texts with their left and right ends and their height."""
    found = []
    for text in tree(content).iter("text"):
        wide = text_width(text.text or "", 12.0)
        x = float(text.attrib["x"])
        left = {"end": x - wide, "middle": x - wide / 2}.get(text.attrib.get("text-anchor", "start"), x)
        found.append((text.text or "", left, left + wide, float(text.attrib["y"])))
    return found


def test_points_lie_where_the_ticks_say() -> None:
    points = [(0.0, 0.0), (5.0, 10.0), (10.0, 20.0)]
    content = line_chart([Series("a", points)], Axis("x"), Axis("y"))
    marks = spots(content, "mark")
    ticks = {text: ((left + right) / 2, y) for text, left, right, y in words(content)}
    assert marks[0][0] < marks[1][0] < marks[2][0]
    assert marks[1][0] == pytest.approx((marks[0][0] + marks[2][0]) / 2, abs=0.1)
    assert marks[1][1] == pytest.approx((marks[0][1] + marks[2][1]) / 2, abs=0.1)
    assert marks[2][1] == pytest.approx(ticks["20"][1] - 4, abs=0.1)
    assert marks[0][1] > marks[2][1], "larger is higher"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=6), min_size=1, max_size=5))
def test_everything_stays_on_the_chart_and_names_do_not_touch(lists: list[list[float]]) -> None:
    series = [Series(f"T = {n}", list(enumerate(values))) for n, values in enumerate(lists)]
    content = line_chart(series, Axis("iteration"), Axis("nats"))
    for x, y in spots(content, "hit"):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    names = [w for w in words(content) if w[0].startswith("T = ")]
    assert len(names) == (len(series) if len(series) > 1 else 0)
    for one in range(len(names)):
        assert names[one][2] <= WIDTH + 1
        for two in range(one):
            apart = names[one][1] >= names[two][2] or names[two][1] >= names[one][2]
            assert apart or abs(names[one][3] - names[two][3]) >= 14


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), min_size=2, max_size=5))
def test_names_of_single_points_do_not_touch_and_stay_above_the_axis(
    points: list[tuple[float, float]],
) -> None:
    series = [Series(f"kind {n}", [point], joined=False) for n, point in enumerate(points)]
    content = line_chart(series, Axis("x", ticks=(0.0, 5.0, 10.0)), Axis("y", ticks=(0.0, 1.0)))
    names = [w for w in words(content) if w[0].startswith("kind")]
    floor = max(y for text, _, _, y in words(content) if text in ("0", "10")) - 17
    for one in range(len(names)):
        assert names[one][3] <= floor + 4
        for two in range(one):
            apart = names[one][1] >= names[two][2] or names[two][1] >= names[one][2]
            assert apart or abs(names[one][3] - names[two][3]) >= 14


@settings(max_examples=40, deadline=None)
@given(VALUES, VALUES)
def test_labels_of_the_horizontal_axis_do_not_touch(a: float, b: float) -> None:
    points = [(min(a, b), 1.0), (max(a, b), 2.0)]
    content = line_chart([Series("s", points)], Axis("x"), Axis("y"))
    lowest = max(y for text, _, _, y in words(content) if text != "x")
    ticks = sorted((left, right) for text, left, right, y in words(content) if y == lowest and text != "x")
    assert all(right <= left for (_, right), (left, _) in itertools.pairwise(ticks))


def test_values_that_are_no_numbers_are_left_out() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    series = Series("a", points, band=[(0.0, 1.0)] * 4)
    content = line_chart([series, Series("empty", [])], Axis("x"), Axis("y"))
    assert len(spots(content, "mark")) == 2


def test_series_differ_without_colour() -> None:
    series = [Series(f"s{n}", [(0.0, n), (1.0, n)]) for n in range(6)]
    root = tree(line_chart(series, Axis("x"), Axis("y")))
    lines = list(root.iter("polyline"))
    assert len({e.attrib.get("stroke-dasharray") for e in lines}) == 6
    shapes = [e for e in root.iter() if "mark" in e.attrib.get("class", "").split()]
    kinds = {(e.tag, "ring" in e.attrib["class"], len(e.attrib.get("points", "").split())) for e in shapes}
    assert len(kinds) == 6 - 1, "square and diamond have four corners both"


def test_bars_are_as_long_as_their_values() -> None:
    root = tree(bar_chart([Bar("a", 10.0), Bar("bb", 5.0), Bar("c", 0.0)]))
    lengths = [float(r.attrib["width"]) for r in root.iter("rect")]
    assert lengths[1] == pytest.approx(lengths[0] / 2, abs=0.1)
    assert lengths[2] < 1
    assert all(right <= WIDTH for _, _, right, _ in words(bar_chart([Bar("a" * 60, 1e6)])))


class TestFigure:
    def figure_of(self, name: str = "f") -> ElementTree.Element:
        made = line_figure(
            name, "A & B", [Series("a", [(1.0, 2.0), (2.0, 4.0)])], Axis("x"), Axis("y"), description="rises"
        )
        return ElementTree.fromstring(made.file())

    def test_a_file_is_xml_with_title_description_and_its_own_style(self) -> None:
        root = self.figure_of()
        space = "{http://www.w3.org/2000/svg}"
        assert root.tag == space + "svg"
        title, description = root.find(space + "title"), root.find(space + "desc")
        assert title is not None
        assert description is not None
        assert (title.text, description.text) == ("A & B", "rises")
        assert root.attrib["aria-labelledby"] == title.attrib["id"]
        assert root.attrib["aria-describedby"] == description.attrib["id"]
        style = root.find(space + "style")
        assert style is not None
        assert "prefers-color-scheme: dark" in (style.text or "")

    def test_a_file_asks_for_nothing_outside(self) -> None:
        text = ElementTree.tostring(self.figure_of(), encoding="unicode")
        assert "href" not in text
        assert "url(" not in text

    def test_the_table_holds_every_value(self) -> None:
        series = [Series("a", [(1.0, 2.0), (2.0, 4.0)]), Series("b", [(2.0, 8.0)])]
        table = line_figure("f", "t", series, Axis("x"), Axis("y"), description="d").table
        assert list(table.header) == ["x", "a", "b"]
        assert [list(row) for row in table.rows] == [[1.0, 2.0, ""], [2.0, 4.0, 8.0]]
        bars = bar_figure("f", "t", [Bar("a", 3.0)], unit="bytes", description="d").table
        assert [list(row) for row in bars.rows] == [["a", 3.0]]

"""Calibration and figures by position from what `eval --json` printed; takes what is there."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.figures import Figure, Table, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import percent, short
from pipeline.reporting.page import Section, fact_list

_ECE = ("expected_calibration_error", "ece", "calibration_error")
_BINS = ("bins", "calibration_bins", "reliability")
_POSITIONS = ("by_position", "positions")
_COUNTS = ("tokens", "count", "share")


def calibration_section(evaluation: Mapping[str, Any] | None) -> Section:
    """How honest the student's probabilities are, and how its figures change along a sequence."""
    title = "On held-out text"
    if evaluation is None:
        return Section(
            "evaluation",
            title,
            skipped="give --eval FILE, the output of 'pmetal-pipeline eval --json', to see it",
        )
    rows = _bins(evaluation)
    figures = [_reliability(rows, _error(evaluation))] if rows else []
    beside = [tag("div", tag("h3", "Means"), _plain_figures(evaluation), class_="card")]
    if (positions := _by_position(evaluation)) is not None:
        beside.append(tag("div", tag("h3", "By position"), positions.element(), class_="card"))
    lead = ["What 'eval' measured with the teacher itself, on text that was not trained on."]
    if rows:
        lead.append(
            "Where the student gives its first choice a probability of 0.7, it should be right seven times "
            "in ten: on the dashed line. Below the line it is too sure of itself."
        )
    return Section("evaluation", title, lead, figures, beside)


def _reliability(rows: Sequence[Mapping[str, Any]], error: float | None) -> Figure:
    points = [(float(row["confidence"]), float(row["accuracy"])) for row in rows]
    counted = next((name for name in _COUNTS if name in rows[0]), None)
    note = f"Expected calibration error {short(round(error, 4))}." if error is not None else ""
    ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
    figure = line_figure(
        "calibration",
        "Calibration of the student",
        [
            Series("exact", [(0.0, 0.0), (1.0, 1.0)], plain=True),
            Series("student", sorted(points)),
        ],
        Axis("probability of its first choice", ticks=ticks),
        Axis("share that is right", ticks=ticks),
        description="Share of right first choices by the probability that the student gave them, with the "
        "diagonal of exact calibration. " + note,
        note=note,
    )
    if counted is None:
        return figure
    header = ["probability", "share that is right", counted]
    cells = [[row["confidence"], row["accuracy"], row.get(counted, "")] for row in rows]
    return Figure(
        figure.name,
        figure.title,
        figure.description,
        figure.content,
        figure.width,
        figure.height,
        Table(header, cells),
        note,
    )


def _bins(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = _first(evaluation, _BINS)
    rows = found if isinstance(found, list) else []
    return [
        row
        for row in rows
        if isinstance(row, Mapping) and _number(row.get("confidence")) and _number(row.get("accuracy"))
    ]


def _error(evaluation: Mapping[str, Any]) -> float | None:
    found = _first(evaluation, _ECE)
    return float(found) if _number(found) else None


def _first(evaluation: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the keys, at the top or under `calibration`."""
    inside = evaluation.get("calibration")
    places = [evaluation, inside] if isinstance(inside, Mapping) else [evaluation]
    return next((place[name] for place in places for name in names if name in place), None)


def _by_position(evaluation: Mapping[str, Any]) -> Table | None:
    found = _first(evaluation, _POSITIONS)
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []
    if not rows:
        return None
    header = list(rows[0])
    return Table(header, [[row.get(name, "") for name in header] for row in rows])


def _plain_figures(evaluation: Mapping[str, Any]) -> Element:
    """Every figure that is a single number."""
    shares = ("top1", "top5")
    return fact_list(
        {
            name.replace("_", " "): percent(value) if name in shares else short(value)
            for name, value in evaluation.items()
            if _number(value)
        }
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""Calibration and figures by position and kind, from what `eval --json` printed; takes what is there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.bars import Bar
from pipeline.reporting.figures import Figure, Table, bar_figure, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.numbers import percent, short
from pipeline.reporting.page import Section, fact_list

CURVES = {"reliability": ("the text", "ece"), "reliability_teacher": ("the teacher", "ece_teacher")}
GROUPS = {
    "by_position": ("position", "By position in the document"),
    "by_kind": ("kind", "By kind of document"),
}
MEANS = {
    "top1": "same first choice",
    "top5": "the teacher's among its first five",
    "perplexity": "perplexity",
    "teacher_perplexity": "the teacher's perplexity",
    "ece": "calibration error, text",
    "ece_teacher": "calibration error, teacher",
}
SHARES = ("top1", "top5")
LEAST_TOKENS = 10
_SHARE_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


def evaluation_section(evaluation: Mapping[str, Any] | None) -> Section:
    """How close the student is on text of its own, and how honest its probabilities are."""
    title = "Evaluation"
    if evaluation is None:
        reason = "give --eval FILE, the output of 'pmetal-pipeline eval --json', to see it"
        return Section("evaluation", title, skipped=reason)
    lead = [_source(evaluation)]
    cells: list[Figure | Element] = []
    if curves := _curves(evaluation):
        cells.append(_reliability(curves, evaluation))
        lead.append(
            "Where the student gives its first choice a probability of 0.7, it should be right seven times "
            "in ten: on the dashed line. Below the line it is too sure of itself. A student that equals its "
            "teacher lies on the line when it is judged by the teacher's own probabilities."
        )
    cells.append(tag("div", tag("h3", "Means"), fact_list(_means(evaluation)), class_="card"))
    if (positions := _rows(evaluation, "by_position")) and all("kl@1" in row for row in positions):
        cells.append(_by_position(positions))
    return Section("evaluation", title, lead, [*cells, *_tables(evaluation)])


def _source(evaluation: Mapping[str, Any]) -> str:
    if (sequences := evaluation.get("sequences")) is None:
        return "What 'eval' measured beside the teacher itself."
    return f"What 'eval' measured against a cache, {sequences} sequences, tail {evaluation.get('targets')}."


def _curves(evaluation: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found = {name: _rows(evaluation, name) for name in CURVES}
    wanted = ("confidence", "accuracy")
    return {
        name: rows
        for name, rows in found.items()
        if rows and all(_number(row.get(key)) for row in rows for key in wanted)
    }


def _reliability(curves: Mapping[str, list[Mapping[str, Any]]], evaluation: Mapping[str, Any]) -> Figure:
    series = [Series("exact", [(0.0, 0.0), (1.0, 1.0)], plain=True)]
    cells, errors = [], []
    for name, rows in curves.items():
        judge, error = CURVES[name]
        points = sorted((row["confidence"], row["accuracy"]) for row in rows if _is_sure(row))
        series.append(Series(judge, points))
        cells += [[judge, row["confidence"], row["accuracy"], row.get("tokens", "")] for row in rows]
        if _number(evaluation.get(error)):
            errors.append(f"{evaluation[error]:.3g} against {judge}")
    note = f"Expected calibration error: {', '.join(errors)}. " if errors else ""
    note += f"Bins of fewer than {LEAST_TOKENS} tokens are among the numbers only."
    figure = line_figure(
        "calibration",
        "Calibration of the student's first choice",
        series,
        Axis("probability that the student gives", ticks=_SHARE_TICKS),
        Axis("how often it is right", ticks=_SHARE_TICKS),
        description="Share of right first choices by the probability that the student gave them, judged by "
        f"{' and by '.join(CURVES[name][0] for name in curves)}; the diagonal is exact. {note}",
        note=note,
    )
    return replace(figure, table=Table(["judged by", "probability", "right", "tokens"], cells))


def _is_sure(row: Mapping[str, Any]) -> bool:
    """Whether a bin holds so many tokens that its share means something."""
    tokens = row.get("tokens")
    return not isinstance(tokens, int) or tokens >= LEAST_TOKENS


def _by_position(rows: Sequence[Mapping[str, Any]]) -> Figure:
    bars = [Bar(str(row.get("position")), row["kl@1"], f"{row.get('tokens', '?')} tokens") for row in rows]
    return bar_figure(
        "kl-by-position",
        "KL(teacher ‖ student) by tokens of the document before",
        bars,
        unit="nats, T = 1",
        description=f"{short(bars[0].value)} nats at positions {bars[0].name}, {short(bars[-1].value)} at "
        f"{bars[-1].name}, T = 1.",
        note="Nats, T = 1.",
    )


def _means(evaluation: Mapping[str, Any]) -> dict[str, str]:
    return {
        _mean_name(name): percent(value) if name in SHARES else short(value)
        for name, value in evaluation.items()
        if _number(value)
    }


def _tables(evaluation: Mapping[str, Any]) -> list[Element]:
    cards = []
    for name, (first, title) in GROUPS.items():
        if rows := _rows(evaluation, name):
            header = [first, *(key for key in rows[0] if key != first)]
            table = Table(header, [[row.get(key, "") for key in header] for row in rows])
            cards.append(tag("div", tag("h3", title), table.element(), class_="card wide"))
    return cards


def _mean_name(key: str) -> str:
    kind, at, temperature = key.partition("@")
    return f"{kind.upper()}, T = {temperature}, nats" if at else MEANS.get(key, key.replace("_", " "))


def _rows(evaluation: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = evaluation.get(name)
    return [row for row in found if isinstance(row, Mapping)] if isinstance(found, list) else []


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

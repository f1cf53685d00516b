"""Error against bytes from the rows of `plan --json`, with this cache among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.reporting.axes import Axis
from pipeline.reporting.figures import Figure, Table, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.markup import Element, tag
from pipeline.reporting.page import Section
from schemas.errors import UsageError

TAILS = {"sketch": "sketch", "bucket": "bucket", "none": "head only"}
_ERRORS = ("error", "gradient", "estimate")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A kind of target with its price.

    Attributes:
        kind: sketch, bucket, head only.
        bytes_per_token: on disk.
        errors: temperature -> error.
        settings: k, rank and step in words.
    """

    kind: str
    bytes_per_token: float
    errors: Mapping[float, float]
    settings: str


def plan_rows(plan: Mapping[str, Any], *, where: str) -> list[PlanRow]:
    """The rows of a plan that have bytes and errors.

    Raises:
        UsageError: none has.
    """
    found = [row for row in map(_row, plan.get("rows") or plan.get("candidates") or []) if row]
    if not found:
        raise UsageError(
            f"{where}: must hold 'rows' with bytes_per_token and error@T, found none; give what "
            "'pmetal-pipeline plan --json' printed"
        )
    return found


def _row(raw: Any) -> PlanRow | None:
    if not isinstance(raw, Mapping) or not _number(raw.get("bytes_per_token")):
        return None
    errors = {}
    for key, value in raw.items():
        name, at, temperature = str(key).partition("@")
        if name in _ERRORS and at and _number(value) and temperature.replace(".", "", 1).isdigit():
            errors[float(temperature)] = float(value)
    if not errors:
        return None
    parts = {"k": raw.get("top_k"), "rank": raw.get("rank"), "step": raw.get("step")}
    settings = ", ".join(f"{name} {value:g}" for name, value in parts.items() if _number(value) and value)
    kind = TAILS.get(str(raw.get("tail")), str(raw.get("tail")))
    return PlanRow(kind, float(raw["bytes_per_token"]), errors, settings)


def plan_section(rows: Sequence[PlanRow], *, here: PlanRow | None) -> Section:
    """One chart a temperature."""
    title = "Error against bytes"
    if not rows:
        return Section(
            "plan", title, skipped="give --plan FILE, the output of 'pmetal-pipeline plan --json', to see it"
        )
    temperatures = sorted({t for row in rows for t in row.errors})
    lead = [
        "What other settings would cost and give, as measured by 'plan' on a sample of the text. Lower is "
        "closer to the teacher, further left is smaller.",
    ]
    if here is not None:
        lead.append(
            "'This cache' is the mean over its shards of what was measured while it was written. The error "
            "falls with the number of tokens it is taken over, so compare it with care."
        )
    figures = [error_figure(rows, t, here=here) for t in temperatures]
    return Section("plan", title, lead, [*figures, _table(rows, temperatures)])


def _table(rows: Sequence[PlanRow], temperatures: Sequence[float]) -> Element:
    header = ["settings", "bytes a token", *(f"error, T = {t:g}" for t in temperatures)]
    cells = [
        [
            f"{row.kind}, {row.settings}" if row.settings else row.kind,
            row.bytes_per_token,
            *(row.errors.get(t, "") for t in temperatures),
        ]
        for row in sorted(rows, key=lambda row: row.bytes_per_token)
    ]
    return tag("div", tag("h3", "All of them"), Table(header, cells).element(), class_="card wide")


def error_figure(rows: Sequence[PlanRow], temperature: float, *, here: PlanRow | None) -> Figure:
    """Errors at one temperature over bytes, a series a kind of target."""
    every = [*rows, *([here] if here else [])]
    kinds = list(dict.fromkeys(row.kind for row in every))
    series = []
    for kind in kinds:
        mine = sorted(
            (r for r in every if r.kind == kind and r.errors.get(temperature, 0) > 0),
            key=lambda r: r.bytes_per_token,
        )
        points = [(r.bytes_per_token, r.errors[temperature]) for r in mine]
        if points:
            falls = all(after[1] < before[1] for before, after in pairwise(points))
            series.append(Series(kind, points, joined=falls and len(points) > 1))
    best = min((p[1], s.name) for s in series for p in s.points)
    return line_figure(
        f"plan-{temperature:g}",
        f"Relative error of the gradient, T\u00a0=\u00a0{temperature:g}",
        series,
        Axis("bytes a token"),
        Axis("error", log=True),
        description=f"The least error at T = {temperature:g} is {best[0]:.3g}, by {best[1]}.",
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The HTML file: style and script are in it, and a content security policy forbids everything else."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.reporting.figures import Figure, asset
from pipeline.reporting.markup import Element, Raw, tag

GENERATOR = "pmetal-pipeline report"


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure of the summary: `value` large, `unit` small behind it."""

    label: str
    value: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report. One that is skipped is named at the end of the page, with the reason.

    Attributes:
        name: its anchor.
        title: its heading.
        lead: what it shows and how to read it; one text a paragraph.
        cells: charts and cards, side by side where there is room.
        extra: elements below them.
        skipped: why there is nothing, or "".
    """

    name: str
    title: str
    lead: Sequence[str] = ()
    cells: Sequence[Figure | Element] = ()
    extra: Sequence[Element] = ()
    skipped: str = ""

    def element(self) -> Element:
        """The section as part of a page."""
        cells = [cell.element() if isinstance(cell, Figure) else cell for cell in self.cells]
        body = [tag("div", cells, class_="figures") if cells else None, self.extra]
        return tag(
            "section",
            tag("div", tag("h2", self.title), [tag("p", text) for text in self.lead], class_="lead"),
            tag("div", body, class_="body"),
            id=self.name,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page says.

    Attributes:
        kicker: a line above the title.
        title: of the page.
        subtitle: a sentence below it.
        tiles: the summary.
        sections: in order.
        footer: the last line.
    """

    kicker: str
    title: str
    subtitle: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""

    @property
    def shown(self) -> list[Section]:
        """Sections with content; the last one says what is missing, if anything is."""
        shown = [section for section in self.sections if not section.skipped]
        missing = {section.title: section.skipped for section in self.sections if section.skipped}
        return [*shown, Section("missing", "Not shown", extra=[facts(missing)])] if missing else shown

    @property
    def figures(self) -> list[Figure]:
        """All charts, in order."""
        return [cell for section in self.shown for cell in section.cells if isinstance(cell, Figure)]

    @property
    def skipped(self) -> dict[str, str]:
        """Sections without content, and why."""
        return {section.name: section.skipped for section in self.sections if section.skipped}

    def html(self) -> str:
        """The file."""
        page = tag("html", self._head(), tag("body", self._body()), lang="en")
        return "<!doctype html>\n" + page.render() + "\n"

    def _head(self) -> Element:
        style, script = _style(), asset("page.js")
        policy = (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
            "base-uri 'none'; form-action 'none'"
        )
        return tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="referrer", content="no-referrer"),
            tag("meta", name="generator", content=GENERATOR),
            tag("title", f"{self.title} · {self.kicker}"),
            tag("style", Raw(style)),
        )

    def _body(self) -> list[Element]:
        tiles = [
            tag("div", tag("dt", tile.label), tag("dd", tile.value, " ", tag("small", tile.unit)))
            for tile in self.tiles
        ]
        links = [(tag("a", section.title, href=f"#{section.name}"), " ") for section in self.shown]
        return [
            tag(
                "header",
                tag("p", self.kicker, class_="kicker"),
                tag("h1", self.title),
                tag("p", self.subtitle, class_="subtitle"),
                tag("dl", tiles, class_="tiles") if tiles else None,
                tag("nav", links, aria_label="Sections"),
            ),
            tag("main", [section.element() for section in self.shown]),
            tag("footer", self.footer),
            tag("div", id="tip", role="tooltip", hidden=True),
            tag("script", Raw(asset("page.js"))),
        ]


def facts(pairs: Mapping[str, Any], *, summary: str = "") -> Element:
    """Names and values in two columns; with a `summary` folded up below it."""
    listed = fact_list(pairs)
    return tag("div", tag("details", tag("summary", summary), listed) if summary else listed, class_="card")


def fact_list(pairs: Mapping[str, Any]) -> Element:
    """Names and values."""
    rows = [(tag("dt", name), tag("dd", str(value))) for name, value in pairs.items()]
    return tag("dl", rows, class_="facts")


def _style() -> str:
    return asset("chart.css") + asset("page.css")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

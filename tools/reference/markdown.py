"""Pieces of Markdown: tables, code, first sentences."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are Markdown already."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(re.sub(r" +\|", " |", line) for line in lines)


def code(text: str) -> str:
    """Text in a code span that may stand in a table."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def plain(text: str) -> str:
    """Words of a docstring for a table."""
    return " ".join(text.split()).replace("|", "\\|")


def first_sentence(text: str | None) -> str:
    """Of a docstring: its first paragraph up to the first full stop."""
    paragraph = " ".join((text or "").strip().split("\n\n")[0].split())
    return plain(re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0])


def attributes(text: str | None) -> dict[str, str]:
    """Name to meaning, out of the section `Attributes:` of a docstring; `a, b: ...` gives both."""
    found: dict[str, str] = {}
    names: list[str] = []
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)+)", text or "", re.MULTILINE)
    for line in (section.group(1) if section else "").splitlines():
        started = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if started:
            names = started.group(1).split(", ")
            found |= dict.fromkeys(names, started.group(2))
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found

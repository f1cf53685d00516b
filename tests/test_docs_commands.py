"""Commands, options and links in the documentation exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from pipeline.cli import COMMANDS, group
from tools.reference.commands import command
from tools.reference.sources import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "schemas/FORMAT.md"])
SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(\S.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def written_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Command and options of every `pmetal-pipeline C --x` and `C --x` in code."""
    joined = text.replace("\\\n", " ")
    fenced = [line for block in FENCE.findall(joined) for line in block.splitlines()]
    for code in [*fenced, *INDENTED.findall(joined), *SPAN.findall(FENCE.sub("", joined))]:
        for part in re.split(r"[;&|]{1,2} | # ", code):
            words = (
                part.partition("pmetal-pipeline ")[2].split() if "pmetal-pipeline " in part else part.split()
            )
            named = bool(words) and words[0] in COMMANDS
            if named and ("pmetal-pipeline " in part or (words[1:2] and words[1].startswith("--"))):
                flags = [re.split(r"[=)\],:.']", word)[0] for word in words[1:]]
                yield words[0], [flag for flag in flags if re.fullmatch(r"--?[a-z][a-z-]*", flag)]


def flags_of(name: str) -> set[str]:
    own = [option for option in [*command(name).params, *group.params] if isinstance(option, click.Option)]
    return {flag for option in own for flag in (*option.opts, *option.secondary_opts)} | {"--help", "-h"}


FOUND = [
    (page.relative_to(ROOT).as_posix(), name, flags)
    for page in PAGES
    for name, flags in written_commands(page.read_text(encoding="utf-8"))
]


def test_there_are_commands_to_check() -> None:
    assert len(FOUND) > 40
    assert {name for _, name, _ in FOUND} == set(COMMANDS)


def test_their_options_exist() -> None:
    wrong = [(page, name, flag) for page, name, flags in FOUND for flag in set(flags) - flags_of(name)]
    assert wrong == []


def test_options_are_found_in_text() -> None:
    block = "```\npmetal-pipeline train --student S \\\n  --nothing=1  # no\n```"
    text = f"see `cache --resume`\n{block}\nand `verify`"
    assert list(written_commands(text)) == [("train", ["--student", "--nothing"]), ("cache", ["--resume"])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if ":" in path:
            continue
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

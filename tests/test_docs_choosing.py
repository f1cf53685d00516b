"""The page on choosing: its defaults are those of the code, its settings ones that the code takes."""

import dataclasses
import re

import pytest

from pipeline.settings import CacheSettings
from pipeline.settings.cache import USUAL_RANK
from tools.reference.commands import options
from tools.reference.sources import ROOT

PAGE = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (cache|train) \| `--([a-z-]+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
SECTION = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_it_speaks_of_what_has_to_be_chosen() -> None:
    assert {name for _, name, _ in ROWS} >= {
        *("tail", "top-k", "sketch-rank", "sketch-step", "batch-size", "temperature", "alpha", "head-chunk"),
    }


@pytest.mark.parametrize(("command", "option", "default"), [row for row in ROWS if row[2].startswith("`")])
def test_its_defaults_are_those_of_the_code(command: str, option: str, default: str) -> None:
    shown = {flag: found.default for found in options(command) for flag in found.flags}
    assert shown[f"--{option}"] == default.strip("`")


def test_the_usual_rank_is_that_of_the_code() -> None:
    assert ("cache", "sketch-rank", f"{USUAL_RANK}, or the width of a narrower teacher") in ROWS


def test_the_defaults_are_set_in_bold_where_they_are_measured() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(CacheSettings)}
    assert f"| **{fields['top_k']}** | **" in SECTION["k and the tail"]
    row = next(
        line for line in SECTION["Rank and step"].splitlines() if line.startswith(f"| **{USUAL_RANK}**")
    )
    heads = next(line for line in SECTION["Rank and step"].splitlines() if line.startswith("| rank |"))
    bold = [cell.strip().startswith("**") for cell in row.split("|")[2:]].index(True)
    assert heads.split("|")[2:][bold].strip() == f"step {fields['sketch_step']:g}"


def test_every_table_of_figures_has_its_command() -> None:
    for name in (
        "k and the tail",
        "Rank and step",
        "Temperature and alpha",
        "Memory of a run: batch, head chunk, adapters",
    ):
        before = SECTION[name].split("\n|---")[0]
        assert "    pmetal-pipeline " in before, name

"""The tutorial runs from top to bottom with a tiny teacher, and prints what it promises."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks, run_shell
from tests.tiny import build_tiny_model

PAGE = "docs/tutorial.md"
FENCES = re.compile(r"^```(sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder afterwards, and what each block printed."""
    teacher = build_tiny_model(tmp_path_factory.mktemp("models") / "teacher", hidden_size=256)
    folder = tmp_path_factory.mktemp("tutorial")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "TEACHER": str(teacher),
    }
    return folder, run_shell(blocks(PAGE, "sh"), folder, environment)


def promises() -> list[tuple[int, str]]:
    """(number of a block, line shown under it) for every line that is not cut."""
    found, number = [], -1
    for language, content in FENCES.findall((ROOT / PAGE).read_text()):
        number += language == "sh"
        if language == "text":
            found += [(number, line) for line in content.splitlines() if line.strip(" .")]
    return found


def kind(line: str) -> str:
    """What stays of a line with other figures: its first column's words, or all but the numbers."""
    line = re.sub(r"'[^']*'", "''", line)
    words = re.split(r"  |[\d'\"]", line.strip())[0].strip()
    return words or re.sub(r"[\d.,]+", "#", " ".join(line.split()))


def test_every_block_shows_what_it_prints(ran: tuple[Path, list[str]]) -> None:
    shown = promises()
    assert len(shown) > 100
    for number, line in shown:
        printed = {kind(text) for text in ran[1][number].splitlines()}
        assert kind(line) in printed, f"block {number} promises {line!r}, printed:\n{ran[1][number]}"


def test_every_file_it_speaks_of_is_there(ran: tuple[Path, list[str]]) -> None:
    for path in ("run/model/model.safetensors", "lora/adapters.safetensors", "run.html", "cache.html"):
        assert (ran[0] / path).stat().st_size > 0, path
    assert list((ran[0] / "lists" / "data").glob("*.parquet"))


def test_links_lead_somewhere() -> None:
    page = (ROOT / PAGE).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link


def test_a_failure_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no-such-command"):
        run_shell(["echo fine", "no-such-command", "echo later"], tmp_path, os.environ)

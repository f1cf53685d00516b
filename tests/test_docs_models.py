"""docs/models.md names every architecture of mlx-lm, and a dozen of them still do what it says."""

from pathlib import Path

import pytest

from tests.zoo.configs import ELSEWHERE, architectures
from tests.zoo.sweep import try_architecture
from tests.zoo.table import COLUMNS, cells_of, table_of

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
EXACT = COLUMNS.index("exact") - 1
SHORT = [
    *("llama", "gemma2", "gpt2", "gpt_neox", "mamba", "mixtral", "deepseek_v32", "gemma3n"),
    *("muse_glimmer", "openelm", "recurrent_gemma", "qwen3_next"),
]


def test_the_page_is_complete() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert sorted(table_of(text)) == architectures()
    assert all(f"- {name}: {why}." in text for name, why in ELSEWHERE.items())
    assert len(text.splitlines()) <= 150


def test_nothing_on_the_page_failed() -> None:
    table = table_of(PAGE.read_text(encoding="utf-8"))
    assert not [name for name, cells in table.items() if "FAILED" in cells or "-" in cells]


@pytest.mark.parametrize("name", SHORT)
def test_an_architecture_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    row = try_architecture(name, tmp_path)
    assert row.failures == {}
    written, found = (list(cells) for cells in (table_of(PAGE.read_text("utf-8"))[name], cells_of(row)))
    written[EXACT] = found[EXACT] = ""
    assert found == written

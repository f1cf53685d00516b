"""The page on troubleshooting speaks of errors that exist, and of every class and family of them."""

import re
from pathlib import Path

import pytest

from schemas import errors
from tools.reference.families import FAMILIES, family_of
from tools.reference.raises import CLASSES, Collector, ErrorText
from tools.reference.sources import ROOT, Sources

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NO_ERROR = "No error, but not as it should be"
QUOTES = [
    (section, quote)
    for section, text in SECTIONS.items()
    if section != NO_ERROR
    for quote in re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
]


@pytest.fixture(scope="module")
def texts() -> list[ErrorText]:
    return Collector(Sources.read()).texts()


def test_its_sections_are_the_families() -> None:
    assert list(SECTIONS) == [*FAMILIES, NO_ERROR]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_section_speaks_of_some_errors(family: str) -> None:
    assert len([quote for section, quote in QUOTES if section == family]) >= 3


@pytest.mark.parametrize(("section", "quote"), QUOTES)
def test_what_it_quotes_can_be_raised(section: str, quote: str, texts: list[ErrorText]) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in quote.split("…") if part.strip())
    assert any(re.search(pattern, text.text) for text in texts), f"{section}: no error says `{quote}`"


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_explained(name: str) -> None:
    assert issubclass(CLASSES[name], errors.PmetalError)
    assert f"| `{name}` |" in PAGE


def test_every_module_that_raises_belongs_to_a_family(texts: list[ErrorText]) -> None:
    assert {family_of(text.module) for text in texts} == set(FAMILIES)


def test_a_module_without_family_is_named() -> None:
    with pytest.raises(LookupError, match=r"new\.module: raises errors"):
        family_of("new.module")


@pytest.mark.parametrize("prefix", [prefix for prefixes in FAMILIES.values() for prefix in prefixes])
def test_families_name_modules_that_exist(prefix: str) -> None:
    place = Path(ROOT, *prefix.split("."))
    assert place.is_dir() or place.with_suffix(".py").is_file()

"""The list of error texts holds every error that the packages can make, as it is really worded."""

import ast
import builtins
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main
from tools.reference.__main__ import DOCS
from tools.reference.raises import Collector, ErrorText
from tools.reference.sources import Place, Sources, called

PYTHON = {name for name, value in vars(builtins).items() if isinstance(value, type)}
OTHERS = {"ConstructorError", "fail"}  # PyYAML's, click's
PAGE = (DOCS / "reference-errors.md").read_text(encoding="utf-8")
Collect = Callable[[str], list[ErrorText]]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.read()


@pytest.fixture(scope="module")
def texts(sources: Sources) -> list[ErrorText]:
    return Collector(sources).texts()


def test_every_text_stands_under_its_module(texts: list[ErrorText]) -> None:
    assert len(texts) > 500
    for text in texts:
        assert f"### {text.module}\n" in PAGE


def test_every_error_that_is_made_has_a_text(sources: Sources) -> None:
    collector = Collector(sources)
    made = [p for places in list(sources.calls.values()) for p in places if collector.error_of(p)]
    assert len(made) > 400
    for place in made:
        assert list(collector.texts_of(place)), (place.module, ast.unparse(place.node))


def test_every_raise_is_of_an_error_that_is_understood(sources: Sources) -> None:
    collector = Collector(sources)
    nodes = [node for tree in sources.trees.values() for node in ast.walk(tree)]
    classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    makers = {
        place.function.node.name
        for places in list(sources.calls.values())
        for place in places
        if place.function and collector.error_of(place)
    }

    def understood(place: Place, error: ast.Call) -> bool:
        name = called(error)
        ours = collector.error_of(dataclasses.replace(place, node=error))
        same_again = ast.unparse(error.func).startswith("type(")
        return bool(ours) or same_again or name in PYTHON | OTHERS | makers or name in classes

    for place in sources.raises:
        error = place.node.exc  # type: ignore[attr-defined]
        if isinstance(error, ast.Call):
            assert understood(place, error), (place.module, ast.unparse(error))


@pytest.mark.parametrize(
    "words",
    [
        "cache --teacher nowhere --data nothing.txt --out out",
        "train --student s --out out",
        "train --student s --cache c --out out --alpha 3",
        "train -c bad.yaml",
        "train -c twice.yaml",
        "status .",
        "verify nowhere",
        "init-student --teacher t --out o --num-layers 2 --layers 1",
        "eval student",
        "import vllm nowhere --tokenizer t --teacher-name n --out o --tail sketch",
    ],
)
def test_what_is_really_said_is_in_the_list(
    words: str,
    texts: list[ErrorText],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("studnet: s\n")
    Path("twice.yaml").write_text("seed: 1\nseed: 2\n")
    with pytest.raises(SystemExit):
        main(words.split())
    said = capfd.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")
    assert any(re.fullmatch(as_pattern(text.text), said) for text in texts), said


def as_pattern(skeleton: str) -> str:
    """A skeleton as a regular expression: anything in the place of its values."""
    return ".*".join(re.escape(part) for part in re.split(r"\{[^}]*\}|…", skeleton))


class TestCollector:
    @pytest.fixture
    def collect(self, tmp_path: Path) -> Collect:
        def run(text: str) -> list[ErrorText]:
            for package in ("schemas", "pmetal_distill", "pipeline"):
                (tmp_path / package).mkdir(exist_ok=True)
            (tmp_path / "pipeline/made.py").write_text(text)
            return Collector(Sources.read(tmp_path)).texts()

        return run

    def test_an_f_string_gives_its_literals(self, collect: Collect) -> None:
        (text,) = collect(
            "def f(n):\n    raise UsageError(f'n: must be 1, found {n} of {len(n)}' '; give 1')\n"
        )
        assert text == ErrorText("pipeline.made", "UsageError", "n: must be 1, found {n} of …; give 1")

    def test_a_helper_gives_the_texts_of_its_callers(self, collect: Collect) -> None:
        found = collect(
            "def check(name, must, do='give more'):\n    raise DataError(f'{name}: must be {must}; {do}')\n"
            "def f():\n    check('a', 'at least one')\n    check('b', 'a number', 'write digits')\n"
        )
        assert [text.text for text in found] == [
            "a: must be at least one; give more",
            "b: must be a number; write digits",
        ]

    def test_a_variable_gives_what_was_put_into_it(self, collect: Collect) -> None:
        found = collect("def f(x):\n    do = 'wait' if x else 'go on'\n    raise ModelError(f'{x}: {do}')\n")
        assert [text.text for text in found] == ["{x}: go on", "{x}: wait"]

    def test_an_error_that_is_returned_counts(self, collect: Collect) -> None:
        (text,) = collect("def problem():\n    return CacheError('it is full')\n")
        assert (text.error, text.text) == ("CacheError", "it is full")

    def test_a_class_that_is_an_argument_is_that_of_default_and_callers(self, collect: Collect) -> None:
        (text,) = collect(
            "def f(x, error: type[PmetalError] = CacheError):\n    raise error(f'{x} is lost')\n"
            "f(1, error=CheckpointError)\n"
        )
        assert text.error == "CacheError or CheckpointError"

"""Configuration files: strict keys, strict types, the line of every fault, and a round trip."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import load_config, resolve, save_config
from schemas.errors import UsageError


@dataclass(frozen=True, slots=True)
class Nested:
    name: str
    steps: int = 0
    arguments: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"steps: must be at least 0, found {self.steps}; give another value")


@dataclass(frozen=True, slots=True)
class Example:
    foreign_keys: ClassVar[Mapping[str, str]] = {"data": "give 'folder'"}

    model: str = field(metadata={"aliases": ("student",)})
    rate: float = 1e-5
    count: int = 3
    flag: bool = False
    folder: Path = Path("here")
    mode: Literal["fast", "slow"] = "fast"
    layers: tuple[int, ...] | Literal["all"] = ()
    keys: tuple[str, ...] | None = None
    heat: float | Nested = 2.0
    plan: Literal["constant"] | Nested = "constant"
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str | None = None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(file: Path, text: str) -> dict[str, Any]:
    file.write_text(text, encoding="utf-8")
    return load_config(file, Example)


def fault(file: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(file, text)
    return str(caught.value)


def test_only_the_given_keys_come_back_converted(file: Path) -> None:
    text = """
student: some/model
rate: 1
folder: ~/there
layers: [6, 12, -1]
heat: {name: linear, steps: 10, arguments: [4, 1e0]}
extra: {adamw: {betas: [0.9, 0.98], eps: 1e-8}}
note: null
"""
    assert load(file, text) == {
        "model": "some/model",
        "rate": 1.0,
        "folder": Path("~/there"),
        "layers": (6, 12, -1),
        "heat": Nested("linear", 10, (4.0, 1.0)),
        "extra": {"adamw": {"betas": [0.9, 0.98], "eps": 1e-8}},
        "note": None,
    }
    assert load(file, "") == {}
    assert load(file, "# nothing\n") == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("+2e3", 2e3),
        ("1.5e3", 1.5e3),
        (".5e-1", 0.05),
        ("1_0e1", 100.0),
        ("3", 3.0),
    ],
)
def test_numbers_with_an_exponent_are_numbers(file: Path, text: str, value: float) -> None:
    rate = load(file, f"rate: {text}")["rate"]
    assert (rate, type(rate)) == (value, float)


@pytest.mark.parametrize("text", ["1e", "e5", "1e-", "x1e5", "1e5x", "."])
def test_what_only_looks_like_a_number_is_a_string(file: Path, text: str) -> None:
    assert load(file, f"note: {text}")["note"] == text


def test_unknown_key_has_line_and_suggestion(file: Path) -> None:
    assert fault(file, "count: 1\nraet: 2") == f"{file}:2: 'raet': is no key here; did you mean 'rate'?"
    assert "did you mean 'folder'?" in fault(file, "Folder: x")
    assert "the keys are model, student, rate" in fault(file, "zzz: 2")
    assert fault(file, "\n\nplan:\n  name: a\n  stepz: 1").startswith(
        f"{file}:5: 'plan.stepz': is no key here; did you mean 'steps'?"
    )


def test_key_of_another_tool_says_what_to_do(file: Path) -> None:
    assert fault(file, "data: x") == f"{file}:1: 'data': is no key here; give 'folder'"


def test_duplicate_keys_are_refused_with_both_lines(file: Path) -> None:
    assert fault(file, "rate: 1\ncount: 1\nrate: 2").startswith(
        f"{file}:3: 'rate' must stand once, found it in line 1 too"
    )
    assert ":3: 'extra.a' must stand once" in fault(file, "extra:\n  a: {b: 1}\n  a: {}")
    assert ":2: 'extra.a.b' must stand once" in fault(file, "extra:\n  a: {b: 1, b: 2}")
    assert "means the same as 'model', found both" in fault(file, "model: a\nstudent: b")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("count: 1.5", "'count': must be a whole number, found 1.5"),
        ("count: true", "'count': must be a whole number, found true"),
        ("count:", "'count': must be a whole number, found nothing"),
        ("count: [1]", "'count': must be a whole number, found a list"),
        ('rate: "1e-5"', "'rate': must be a number, found the string '1e-5'"),
        ("rate: yes", "'rate': must be a number, found true"),
        ("flag: 1", "'flag': must be true or false, found 1"),
        ("model: 7", "'model': must be a string, found 7"),
        ("model: {a: 1}", "'model': must be a string, found a mapping"),
        ("mode: medium", "'mode': must be one of 'fast', 'slow', found the string 'medium'"),
        ("layers: 6", "'layers': must be a list (each item a whole number) or 'all', found 6"),
        ("layers: [6, x]", "'layers.1': must be a whole number, found the string 'x'"),
        ("keys: [a, 1]", "'keys.1': must be a string, found 1"),
        ("heat: hot", "must be a number or a mapping with name, steps, arguments, found the string 'hot'"),
        ("heat: {steps: 1}", "'heat': must have the key 'name', found none"),
        ("heat: {name: a, steps: -1}", "'heat': steps: must be at least 0, found -1"),
        ("extra: {a: 1}", "'extra.a': must be a mapping, found 1"),
        ("extra: {1: {}}", "'extra': must be a mapping, found a mapping"),
        ("note: 2024-01-01", "'note': must be a string or null, found 2024-01-01"),
    ],
)
def test_type_errors_name_key_line_expected_and_found(file: Path, line: str, expected: str) -> None:
    message = fault(file, f"# first\n{line}\n")
    assert message.startswith(f"{file}:2: ")
    assert expected in message


def test_items_of_block_lists_have_their_own_line(file: Path) -> None:
    assert fault(file, "layers:\n  - 1\n  - x\n").startswith(f"{file}:3: 'layers.1'")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rate: [1", ":1: must be YAML"),
        ("a: b: c", ":1: must be YAML"),
        ("- 1\n- 2", "must be a mapping, found something else"),
        ("model: !!python/object/apply:os.getcwd []", ":1: must be YAML"),
        ("rate: 1\n---\nrate: 2", "must be YAML"),
        ("note: 2024-99-99", "must be YAML"),
        ("count: " + "9" * 5000, "must be YAML"),
        ("note: " + "[" * 5000, "must be YAML"),
        ("note: \x07", "must be YAML"),
        ("extra: &a {b: *a}", "'extra.b' must not contain itself"),
        ("? [1]\n: 2", "must be YAML"),
    ],
)
def test_broken_files(file: Path, text: str, expected: str) -> None:
    message = fault(file, text)
    assert message.startswith(str(file))
    assert expected in message


def test_unreadable_files(file: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml: must be a readable file, found: No such file"):
        load_config(file, Example)
    file.write_bytes(b"note: \xff")
    with pytest.raises(UsageError, match="must be UTF-8"):
        load_config(file, Example)


def test_merge_keys_and_aliases_work(file: Path) -> None:
    values = load(file, "extra:\n  a: &a {x: 1, y: 2}\n  b: {<<: *a, y: 3}\n  c: *a\n")
    assert values["extra"] == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_command_line_beats_file_beats_default() -> None:
    made = resolve(
        Example,
        {"model": "file", "rate": 1.0, "count": 4},
        {"model": "typed", "rate": None, "flag": True, "heat": 3, "layers": (1, 2)},
    )
    assert made == Example(model="typed", rate=1.0, count=4, flag=True, heat=3.0, layers=(1, 2))


def test_an_option_of_the_wrong_type_is_named() -> None:
    with pytest.raises(UsageError, match="--count: must be a whole number, found the string 'x'"):
        resolve(Example, {}, {"model": "a", "count": "x"})


def test_a_missing_setting_names_option_and_key() -> None:
    with pytest.raises(
        UsageError, match="model: must be given, found nothing; add --model or the key 'model'"
    ):
        resolve(Example, {"count": 3}, {})


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8) | st.sampled_from(
    [
        "1e5",
        "1e-5",
        "null",
        "no",
        "~",
        "1:30",
        "2024-01-01",
        "0x1f",
        ".5e3",
        "=",
        "<<",
        "",
        "a: b",
        "# x",
        "é\n",
    ]
)
floats = st.floats(allow_nan=False)
nested = st.builds(Nested, name=texts, steps=st.integers(0, 9), arguments=st.tuples(floats, floats))
examples = st.builds(
    Example,
    model=texts,
    rate=floats,
    count=st.integers(),
    flag=st.booleans(),
    folder=st.sampled_from([Path("a/b c"), Path("1e5")]),
    mode=st.sampled_from(["fast", "slow"]),
    layers=st.lists(st.integers(), max_size=3).map(tuple) | st.just("all"),
    keys=st.none() | st.lists(texts, max_size=2).map(tuple),
    heat=floats | nested,
    plan=st.just("constant") | nested,
    extra=st.dictionaries(texts, st.dictionaries(texts, floats | texts, max_size=2), max_size=2),
    note=st.none() | texts,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(example=examples)
def test_a_saved_configuration_reads_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, example: Example
) -> None:
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    save_config(example, file)
    assert resolve(Example, load_config(file, Example), {}) == example
    assert [path.name for path in file.parent.iterdir()] == ["run.yaml"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    save_config(Example(model="old"), file)
    before = file.read_bytes()
    with pytest.raises(Exception, match="cannot represent"):
        save_config(Example(model="new", extra={"a": {"b": object()}}), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]

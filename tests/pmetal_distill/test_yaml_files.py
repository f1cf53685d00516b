"""Recipes from strangers: bounded in bytes, values and integers, of plain keys and without tags."""

import os
from pathlib import Path

import pytest

from pmetal_distill.yaml_files import MAX_BYTES, read_yaml, write_yaml
from schemas.errors import UsageError

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "must hold at most 100000 values with its aliases"),
        (f"{LAUGHS}? *a11\n: 1\n", r":12: must be YAML with plain keys"),
        ("a: 1\n? [b]\n: 2\n", r":2: must be YAML with plain keys"),
        ("a: 1\nb: !!python/name:os.system x\n", r":2: must be YAML, found: the tag"),
        ("a: !!timestamp x\n", ":1: must be YAML, found: the tag"),
        ("!!set {a, b}\n", ":1: must be YAML, found: the tag"),
        ("a: 0x" + "f" * 5000, ":1: must be YAML, found: an integer of 5002 characters"),
        ("a: " + "1:" * 5000 + "1", "an integer of 10001 characters"),
        ("a: &a [*a]\n", "must not contain itself"),
        ("a: " + "[" * 5000 + "]" * 5000, "must be YAML"),
        ("a: 2001-13-45\n", "must be YAML"),
        ("a: " + "x" * MAX_BYTES, f"must have at most {MAX_BYTES} bytes"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_yaml(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_only_files_are_read(tmp_path: Path, make: object) -> None:
    make(tmp_path / "x.yaml")  # type: ignore[operator]
    with pytest.raises(UsageError, match="must be a readable file, found: a folder, pipe or device"):
        read_yaml(tmp_path / "x.yaml")


def test_a_linked_recipe_is_read(tmp_path: Path) -> None:
    write_yaml({"a": 1}, tmp_path / "x.yaml")
    (tmp_path / "y.yaml").symlink_to(tmp_path / "x.yaml")
    assert read_yaml(tmp_path / "y.yaml")[0] == {"a": 1}


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", "\u2029", "é\x85", "tab\t", "\x00", "\r", "\ufeff"])
def test_every_text_reads_back(tmp_path: Path, text: str) -> None:
    write_yaml({text: text, "b": [text]}, tmp_path / "x.yaml")
    assert read_yaml(tmp_path / "x.yaml")[0] == {text: text, "b": [text]}

"""Data as people have it: gzip, JSON, CSV, ShareGPT and Alpaca, and a README beside the text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import lines as lines_module
from pipeline.data import load_documents, skipped_files
from pipeline.data.readers import RECORDS
from tests.pipeline.conftest import Cli
from tests.pipeline.test_data_readers import fault, read, write_jsonl

RECORD = {"text": 'one, "two"\nthree', "id": 7}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(path: Path, content: str) -> Path:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


CONTENT = {
    ".jsonl": '{"text": "a"}\n\n{"text": "b"}\n',
    ".json": '[\n{"text": "a"},\n{"text": "b"}\n]',
    ".csv": 'id,text\n1,a\n2,"b"\n',
    ".txt": "a",
}


@pytest.mark.parametrize("suffix", [f"{suffix}{gz}" for suffix in CONTENT for gz in ("", ".gz")])
def test_each_extension_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    file = written(tmp_path / f"x{suffix}", CONTENT[suffix.removesuffix(".gz")])
    assert [d.text for d in read(file)] == (["a"] if "txt" in suffix else ["a", "b"])


def test_places_are_lines_and_numbers_in_a_list(tmp_path: Path) -> None:
    assert [d.line for d in read(written(tmp_path / "a.json", CONTENT[".json"]))] == [1, 2]
    rows = 'text,id\n"one\ntwo",1\n\nthree,2\n'
    documents = read(written(tmp_path / "a.csv", rows))
    assert [(d.text, d.line) for d in documents] == [("one\ntwo", 2), ("three", 5)]


def test_a_json_file_may_hold_one_record_or_lines(tmp_path: Path) -> None:
    assert [d.text for d in read(written(tmp_path / "a.json", json.dumps(RECORD, indent=2)))] == [
        RECORD["text"]
    ]
    assert [d.text for d in read(written(tmp_path / "b.json", CONTENT[".jsonl"]))] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.json",
            '[{"text": "a"},\n{"text": }]',
            "a.json:2: must be JSON, found Expecting value at column 10",
        ),
        ("a.json", '[{"txt": "a"}]', "a.json:1: a record must have 'text'"),
        ("a.json", "[" * 100_000, "a.json: must be one JSON object"),
        ("a.json", "", "a.json:1: must be JSON"),
        (
            "a.csv",
            "text,id\na\n",
            "a.csv:2: a row must have 2 fields, as the first line has text, id, found 1",
        ),
        ("a.csv", 'text\n"a', "a.csv:2: must be CSV with commas, found: unexpected end of data"),
        ("a.csv", "text\n", "a.csv: must hold at least one document"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: str, expected: str) -> None:
    assert expected in fault(written(tmp_path / name, content))


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nM\xfcller\n")
    assert "a.csv:2: must be UTF-8, found byte 0xfc" in fault(tmp_path / "a.csv")


@pytest.mark.parametrize("keep", [5, 30, -1])
def test_truncated_gzip_is_found(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(CONTENT[".jsonl"].encode())[:keep])
    assert "a.jsonl.gz: must be complete gzip data" in fault(file)


def test_gzip_of_several_members_and_none_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n{"te') + gzip.compress(b'xt": "b"}\n'))
    assert [d.text for d in read(file)] == ["a", "b"]
    file.write_bytes(b'{"text": "a"}\n')
    assert "must be gzip data" in fault(file)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz"])
def test_a_gzip_bomb_stops_at_a_limit(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(lines_module, "MAX_WHOLE_BYTES", 1 << 20)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(b" " * (40 << 20)))
    assert "at most 1 MiB" in fault(file)


def test_sharegpt_and_alpaca_become_chats(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    (document,) = read(write_jsonl(tmp_path / "a.jsonl", {"conversations": SHAREGPT, "system": "Be brief."}))
    assert (document.kind, document.messages) == ("messages", (system, *CHAT))
    (document,) = read(write_jsonl(tmp_path / "b.jsonl", {"conversations": CHAT}))
    assert (document.kind, document.messages) == ("messages", tuple(CHAT))
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": ""}
    (document,) = read(write_jsonl(tmp_path / "c.jsonl", record))
    assert document.kind == "completion"
    assert [message["content"] for message in document.messages] == ["Add.\n\n1, 2", "3"]
    (document,) = read(write_jsonl(tmp_path / "d.jsonl", record | {"input": "", "system": "Be brief."}))
    assert [message["content"] for message in document.messages] == ["Be brief.", "Add.", "3"]


def test_the_shapes_of_mlx_lm_come_first(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "output": "3", "conversations": SHAREGPT, "text": "whole"}
    assert [d.kind for d in read(write_jsonl(tmp_path / "a.jsonl", record))] == ["text"]


def test_sharegpt_and_alpaca_out_of_parquet(tmp_path: Path) -> None:
    turns = [[*SHAREGPT, {"from": "human", "value": "Bye", "weight": 1}]]
    pq.write_table(pa.table({"conversations": turns, "system": [None], "x": [1]}), tmp_path / "a.parquet")
    (document,) = read(tmp_path / "a.parquet")
    assert document.messages == (*CHAT, {"role": "user", "content": "Bye"})
    pq.write_table(pa.table({"instruction": ["Q"], "input": [None], "output": ["A"]}), tmp_path / "b.parquet")
    assert [m["content"] for m in read(tmp_path / "b.parquet")[0].messages] == ["Q", "A"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"conversations": [*SHAREGPT, {"from": "narrator", "value": "x"}]},
            "conversations[2] must be an object",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, "'value' must be a string, found null"),
        ({"conversations": []}, "'conversations' must be a list of messages, found an empty list"),
        ({"instruction": "a", "output": 3}, "'output' must be a string, found the number 3"),
        ({"instruction": "a", "answer": "b"}, "found 'instruction', 'answer'; rename the keys"),
    ],
)
def test_wrong_conversations_are_named(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    assert expected in fault(write_jsonl(tmp_path / "a.jsonl", record))


def test_files_about_the_others_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "README.md", "LICENSE", "sub/readme.rst", "README.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in load_documents(tmp_path)] == ["README.txt", "a.txt"]
    assert [file.name for file in skipped_files(tmp_path)] == ["LICENSE", "README.md", "readme.rst"]
    assert skipped_files(tmp_path / "a.txt") == ()
    (tmp_path / "notes.md").write_text("may be text")
    assert "notes.md: the extension must be one of" in fault(tmp_path)


def test_the_command_says_what_it_left_out(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "text" / "README.md").write_text("About this text.")
    words = ("--teacher", tiny_teacher, "--data", tmp_path / "text", "--out", tmp_path / "cache")
    got = cli("cache", *words, "--tail", "bucket", "--max-seq-len", 64)
    assert got.code == 0, got.err
    assert got.err.count("left out README.md") == 1


def test_every_record_format_is_tested() -> None:
    assert {s.removesuffix(".gz").removesuffix(".zst") for s in RECORDS} <= CONTENT.keys()

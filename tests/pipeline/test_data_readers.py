"""Reading documents: every accepted shape, and every fault with its file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data import FieldNames, available_splits, data_files, load_documents
from pipeline.data import lines as lines_module
from schemas.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def read(path: Path, **options: Any) -> list[Any]:
    return list(load_documents(path, **options))


def fault(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def test_text_records_keep_text_and_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "one", "id": 7}, {"text": "zwei\u2028ü"})
    documents = read(file)
    assert [(d.kind, d.text, d.where) for d in documents] == [
        ("text", "one", f"{file}:1"),
        ("text", "zwei\u2028ü", f"{file}:2"),
    ]


def test_prompt_and_completion_become_two_messages_and_win_over_text(tmp_path: Path) -> None:
    tools = [{"name": "f"}]
    record = {"prompt": "Q", "completion": "A", "text": "no", "messages": CHAT, "tools": tools}
    (document,) = read(write_jsonl(tmp_path / "a.jsonl", record))
    assert document.kind == "completion"
    assert document.messages == ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"})
    assert document.tools == tuple(tools)


def test_messages_win_over_text(tmp_path: Path) -> None:
    (document,) = read(write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT, "text": "no"}))
    assert (document.kind, document.messages, document.tools) == ("messages", tuple(CHAT), None)


def test_own_column_names(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"body": "one"})
    assert read(file, fields=FieldNames(text="body"))[0].text == "one"
    assert "'text'" in fault(file)


def test_blank_lines_bom_and_crlf_are_harmless_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(d.text, d.line) for d in read(file)] == [("a", 1), ("b", 4)]


def test_lines_longer_than_a_read_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "READ_BYTES", 5)
    texts = ["x" * length for length in (0, 1, 3, 17, 64)]
    file = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    assert [d.text for d in read(file)] == texts


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_files_of_several_frames(tmp_path: Path, frames: int) -> None:
    file = tmp_path / "a.jsonl.zst"
    compress = zstandard.ZstdCompressor().compress
    records = [json.dumps({"text": f"{i} " + "y" * 5000}) + "\n" for i in range(30)]
    size = len(records) // frames
    file.write_bytes(
        b"".join(compress("".join(records[i : i + size]).encode()) for i in range(0, len(records), size))
    )
    assert [d.text.split()[0] for d in read(file)] == [str(i) for i in range(30)]


@pytest.mark.parametrize("keep", [3, 20, -1])
def test_truncated_zstd_is_found(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.jsonl.zst"
    data = zstandard.ZstdCompressor(write_checksum=True).compress(b'{"text": "one two three"}\n' * 50)
    file.write_bytes(data[:keep])
    assert re.match(rf"{re.escape(str(file))}: must be (complete )?zstd data", fault(file))


def test_flipped_byte_in_zstd_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.zst"
    data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b'{"text": "one two"}\n'))
    data[-6] ^= 1
    file.write_bytes(data)
    assert "must be zstd data" in fault(file)


def test_zstd_bomb_stops_at_the_line_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1 << 20)
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a"}\n' + b" " * (80 << 20)))
    assert f"{file}:2: a line must be at most 1 MiB" in fault(file)


def test_txt_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffline one\nline zwölf\n".encode())
    (document,) = read(file)
    assert (document.text, document.where) == ("line one\nline zwölf\n", str(file))


def test_folder_of_txt_is_many_documents_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a.txt", "b.txt", "sub/c.txt"]


def test_parquet_shapes_and_nulls(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": None}],
        CHAT,
    ]
    tools = [[{"name": "f", "arguments": {"a": 1}}], None]
    pq.write_table(pa.table({"messages": chats, "tools": tools, "x": [1, 2]}), tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert first.messages == ({"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant"})
    assert first.tools == ({"name": "f", "arguments": {"a": 1}},)
    assert (second.messages, second.tools, second.line) == (tuple(CHAT), None, 2)


def test_parquet_text_over_several_batches(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "a.parquet")
    documents = read(tmp_path / "a.parquet")
    assert [d.text for d in documents] == texts
    assert documents[-1].line == 700


def test_parquet_faults(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 this is not Parquet PAR1")
    assert f"{file}: must be a Parquet file" in fault(file)
    pq.write_table(pa.table({"body": ["a"]}), file)
    assert "found 'body'" in fault(file)
    pq.write_table(pa.table({"text": ["a", None]}), file)
    assert f"{file}:2: 'text' must be a string, found null" in fault(file)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    assert "at least one document" in fault(file)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    assert "a.parquet:1: must be readable" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "must be one JSON object, found Expecting ',' delimiter at column 13"),
        ("[" * 100_000, "must be one JSON object"),
        ("9" * 5_000, "must be one JSON object"),
        ('"just text"', "a record must be an object with 'text'"),
        ("{}", "found no key at all"),
        ('{"prompt": "a", "body": "b"}', "found 'prompt', 'body'"),
        ('{"text": 3}', "'text' must be a string, found the number 3"),
        ('{"text": null}', "'text' must be a string, found null"),
        ('{"text": ["a"]}', "'text' must be a string, found a list"),
        ('{"text": "a\\ud800"}', "found half of a surrogate pair at character 1"),
        ('{"prompt": "a", "completion": false}', "'completion' must be a string, found false"),
        ('{"messages": []}', "must be a list of messages, found an empty list"),
        ('{"messages": "a"}', "must be a list of messages, found a string"),
        ('{"messages": ["a"]}', "messages[0] must be an object with a string 'role', found a string"),
        ('{"messages": [{"content": "a"}]}', "messages[0] must be an object with a string 'role', found no"),
        ('{"messages": [{"role": 1}]}', "found role the number 1"),
        ('{"messages": [{"role": "user", "content": 1}]}', "'content' must be a string or a list of parts"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a surrogate pair"),
        ('{"messages": [{"role": "user"}], "tools": {}}', "'tools' must be a list, found an object"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'\n{line}\n{{"text": "fine"}}\n')
    message = fault(file)
    assert message.startswith(f"{file}:2: ")
    assert expected in message
    assert ";" in message


def test_bad_utf8_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "a.jsonl:2: must be UTF-8, found byte 0xff at offset 10" in fault(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n\xfe")
    assert "a.txt:3: must be UTF-8, found byte 0xfe at offset 8" in fault(tmp_path / "a.txt")


def test_mixed_kinds_in_one_file_are_refused_but_not_in_two(tmp_path: Path) -> None:
    mixed = write_jsonl(tmp_path / "mixed.jsonl", {"text": "a"}, {"messages": CHAT})
    assert f"{mixed}:2: all records of a file must have one shape" in fault(mixed)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", {"text": "a"})
    write_jsonl(folder / "b.jsonl", {"messages": CHAT})
    assert [d.kind for d in read(folder)] == ["text", "messages"]


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"{tmp_path / name}: must hold at least one document" in fault(tmp_path / name)


def test_wrong_paths_are_refused_before_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing there"):
        load_documents(tmp_path / "missing")
    with pytest.raises(DataError, match="found none"):
        load_documents(tmp_path)
    (tmp_path / "a.pdf").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.pdf: the extension must be one of \.jsonl, .*found '\.pdf'"):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="split: must be one of"):
        load_documents(tmp_path, split="dev")


def test_unreadable_file_is_a_data_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    documents = load_documents(file)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: must be readable, found: No such file"):
        next(documents)


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_jsonl(tmp_path / f"{split}.jsonl", {"text": split})
    (tmp_path / "README.md").write_text("ignored beside splits")
    assert available_splits(tmp_path) == ("train", "valid")
    assert [d.text for d in read(tmp_path, split="valid")] == ["valid"]
    assert [d.text for d in read(tmp_path)] == ["train"]
    assert "must have a 'test' file, found only train, valid" in fault(tmp_path, split="test")


def test_numbered_pieces_of_a_split(tmp_path: Path) -> None:
    names = ("train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001")
    for name in names:
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    assert [file.stem for file in data_files(tmp_path)] == sorted(names[:2])
    assert [d.text for d in read(tmp_path, split="valid")] == [names[2]]


def test_a_folder_with_only_a_valid_split_has_no_train_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "valid.jsonl", {"text": "a"})
    assert "must have a 'train' file" in fault(tmp_path)


def test_files_and_plain_folders_have_only_a_train_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    assert "has no 'valid' split" in fault(file, split="valid")
    assert "has no 'valid' split" in fault(tmp_path, split="valid")
    assert available_splits(file) == ()

"""Stage one reads its text while the teacher is loaded; what goes wrong on either side; what it reports."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.text
import pmetal_distill.models
from pipeline.cache import run_cache
from pipeline.commands.cache import LABELS
from pipeline.console import Console
from pipeline.data import Document, PackSettings
from pipeline.text import TextAhead
from pmetal_distill.models import load_model, load_tokenizer
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import DataError, ModelError
from tests.pipeline.conftest import Cli
from tests.pipeline.test_stages import settings

QUIET = Console(quiet=True)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("prefetch", "tokenize"))]


def test_the_text_is_read_while_the_weights_are(
    tiny_teacher: Path, text_file: Path, bucket_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, read = pipeline.text.load_documents, pmetal_distill.models._read_weights
    done = threading.Event()

    def documents(*given: Any, **options: Any) -> Iterator[Document]:
        yield from load(*given, **options)
        done.set()

    def weights(*given: Any) -> None:
        assert done.wait(10), "nothing reads the text"
        read(*given)

    monkeypatch.setattr("pipeline.text.load_documents", documents)
    monkeypatch.setattr("pmetal_distill.models._read_weights", weights)
    run_cache(settings(tiny_teacher, text_file, tmp_path / "c", head_chunk=50), QUIET)
    assert LogitCache(tmp_path / "c").root == LogitCache(bucket_cache).root
    assert not threads()


def test_an_unusable_teacher_does_not_wait_for_the_text(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def endless(*_: Any, **__: Any) -> Iterator[Document]:
        while True:
            begun.set()
            yield Document(kind="text", source="a", text="A teacher writes what it knows. " * 9)

    def damaged(*_: Any) -> None:
        assert begun.wait(10)
        raise ModelError("weights: must be whole")

    monkeypatch.setattr("pipeline.text.load_documents", endless)
    monkeypatch.setattr("pmetal_distill.models._read_weights", damaged)
    with pytest.raises(ModelError, match="weights: must be whole"):
        run_cache(settings(tiny_teacher, text_file, tmp_path / "c"), QUIET)
    assert not threads()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", r"train\.jsonl:3: must be one JSON object"),
        ('{"label": 1}', r"train\.jsonl:3: a record must have"),
    ],
)
def test_a_record_that_cannot_be_read_ends_the_command(
    tiny_teacher: Path, tmp_path: Path, cli: Cli, line: str, found: str
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join([json.dumps({"text": "A fox."})] * 2 + [line]))
    got = cli("cache", "--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "c")
    assert got.code == DataError.exit_code
    assert got.out == ""
    assert len(re.findall(found, got.err)) == 1
    assert not (tmp_path / "c").exists()
    assert not threads()


def test_tokens_that_wait_for_the_teacher_are_bounded(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def many(*_: Any, **__: Any) -> Iterator[Document]:
        for number in range(400):
            read.append(number)
            yield Document(kind="text", source="a", line=number, text="A teacher writes. " * 20)

    monkeypatch.setattr("pipeline.text.load_documents", many)
    monkeypatch.setattr("pipeline.text.WAITING_BYTES", 4000)
    monkeypatch.setattr("pipeline.data.tokenizing_batches.BATCH_CHARACTERS", 600)
    monkeypatch.setattr("pipeline.data.tokenizing_batches.CORE_CHARACTERS", 1)
    text = TextAhead("any", split="train")
    try:
        text.start(load_tokenizer(tiny_teacher))
        before = -1
        while len(read) != before:
            before = len(read)
            time.sleep(0.1)
        assert 0 < len(read) < 60
        assert text.packed(PackSettings(max_seq_len=64)).num_documents == 400
        assert len(read) == 400
    finally:
        text.close()
    assert not threads()


def test_the_summary_has_the_time_of_the_whole_command(
    tiny_teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = pmetal_distill.models._read_weights

    def slow(*given: Any) -> None:
        time.sleep(0.3)
        read(*given)

    monkeypatch.setattr("pmetal_distill.models._read_weights", slow)
    started = time.perf_counter()
    found = run_cache(settings(tiny_teacher, text_file, tmp_path / "c"), QUIET)
    elapsed = time.perf_counter() - started
    assert found["seconds"] + 0.3 < found["wall_seconds"] <= elapsed
    assert found["wall_tokens_per_second"] == pytest.approx(found["new_tokens"] / found["wall_seconds"])
    assert 0 < found["reading_seconds"] < found["wall_seconds"]
    assert {*LABELS, "stretches"} == set(found)


def test_a_teacher_at_hand_reads_the_same(tiny_teacher: Path, text_file: Path, tmp_path: Path) -> None:
    teacher = load_model(tiny_teacher)
    for name, given in (("a", teacher), ("b", None)):
        run_cache(settings(tiny_teacher, text_file, tmp_path / name), QUIET, teacher=given)
    assert LogitCache(tmp_path / "a").root == LogitCache(tmp_path / "b").root


def test_both_speeds_have_plain_names(tiny_teacher: Path, text_file: Path, tmp_path: Path, cli: Cli) -> None:
    words = ("--teacher", tiny_teacher, "--data", text_file, "--tail", "bucket", "--max-seq-len", 64)
    got = cli("cache", *words, "--out", tmp_path / "c", "--quiet")
    shown = [line.rsplit("  ", 1)[0].strip() for line in got.out.splitlines()]
    assert shown == list(LABELS.values())
    assert {"tokens/s, whole command", "tokens/s, pass alone"} <= set(shown)
    said = cli("cache", *words, "--out", tmp_path / "c", "--quiet", "--resume", "--json").json
    assert (said["new_tokens"], said["wall_tokens_per_second"]) == (0, 0)

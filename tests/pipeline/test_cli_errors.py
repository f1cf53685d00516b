"""Bad input: each has its own error that names the place, an exit code, and leaves nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.conftest import Cli
from tests.tiny import build_tiny_model
from tests.tiny_gguf import build_tiny_gguf


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestTeacher:
    def test_missing(self, cli: Cli, out: Path, text_file: Path) -> None:
        got = cli("cache", "--teacher", "no/such/folder", "--data", text_file, "--out", out)
        assert got.code == 1
        assert "no/such/folder: no such file or folder" in got.err
        assert not out.exists()

    def test_not_a_model(self, cli: Cli, out: Path, text_file: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        got = cli("cache", "--teacher", tmp_path / "empty", "--data", text_file, "--out", out)
        assert got.code == 1
        assert "not a model (no config.json)" in got.err
        assert not out.exists()

    def test_unsupported_gguf_architecture(
        self, cli: Cli, out: Path, text_file: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", tiny_teacher, general__architecture="mamba")
        got = cli("cache", "--teacher", path, "--data", text_file, "--out", out)
        assert got.code == 1
        assert "mamba" in got.err
        assert not out.exists()

    def test_truncated_gguf(
        self, cli: Cli, out: Path, text_file: Path, tiny_teacher: Path, tmp_path: Path
    ) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", tiny_teacher)
        path.write_bytes(path.read_bytes()[:-3000])
        got = cli("cache", "--teacher", path, "--data", text_file, "--out", out)
        assert got.code == 1
        assert "m.gguf" in got.err
        assert not out.exists()

    def test_a_rank_beyond_the_hidden_size_is_refused_before_anything_is_computed(
        self, cli: Cli, out: Path, text_file: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.calibration.Calibrator.learn", lambda self: pytest.fail("calibrated"))
        got = cli("cache", "--teacher", tiny_teacher, "--data", text_file, "--out", out, "--sketch-rank", 256)
        size = json.loads((tiny_teacher / "config.json").read_text())["hidden_size"]
        assert got.code == 2
        assert f"sketch rank: must be at most {size}, the hidden size of this teacher, found 256" in got.err
        assert not out.exists()


class TestData:
    @pytest.mark.parametrize(
        ("content", "place", "found"),
        [
            ("", "data.jsonl", "found none"),
            ('{"text": "a b c d"}\n{"text": \n', "data.jsonl:2", "JSON"),
            ('{"text": "a b c d"}\n{"txt": "a"}\n', "data.jsonl:2", "'txt'"),
            ('{"text": 3}\n', "data.jsonl:1", "the number 3"),
        ],
    )
    def test_file_and_line_are_named(
        self, cli: Cli, out: Path, tiny_teacher: Path, tmp_path: Path, content: str, place: str, found: str
    ) -> None:
        data = tmp_path / "data.jsonl"
        data.write_text(content)
        got = cli("cache", "--teacher", tiny_teacher, "--data", data, "--out", out, "--tail", "bucket")
        assert got.code == 1
        assert place in got.err
        assert found in got.err
        assert not out.exists()

    def test_prompts_cannot_be_masked_in_plain_text(
        self, cli: Cli, out: Path, tiny_teacher: Path, text_file: Path
    ) -> None:
        words = ("--teacher", tiny_teacher, "--data", text_file, "--out", out, "--mask-prompt")
        got = cli("cache", *words)
        assert got.code == 2
        assert "--mask-prompt" in got.err
        assert not out.exists()


class TestSettings:
    @pytest.mark.parametrize(
        ("yaml", "found"),
        [
            ("top_kk: 3\n", "top_k"),
            ("top_k: 3\nseed: 1\ntop_k: 4\n", "top_k"),
            ("top_k: many\n", "top_k"),
        ],
    )
    def test_configuration_file(self, cli: Cli, tmp_path: Path, yaml: str, found: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("teacher: t\ndata: d\nout: o\n" + yaml)
        got = cli("cache", "--config", path)
        assert got.code == 2
        assert str(path) in got.err
        assert found in got.err

    def test_head_larger_than_the_vocabulary(
        self, cli: Cli, out: Path, tiny_teacher: Path, text_file: Path
    ) -> None:
        words = ("--teacher", tiny_teacher, "--data", text_file, "--out", out, "--top-k", 400)
        got = cli("cache", *words, "--tail", "bucket")
        assert got.code == 2
        assert "top_k: must be at most 319 with a vocabulary of 320" in got.err
        assert not out.exists()

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--temperature", "0"), ("--temperature", "-1"), ("--alpha", "1.5"), ("--alpha", "-0.1")],
    )
    def test_temperature_and_alpha(
        self, cli: Cli, out: Path, tiny_student: Path, bucket_cache: Path, option: str, value: str
    ) -> None:
        got = cli("train", "--student", tiny_student, "--cache", bucket_cache, "--out", out, option, value)
        assert got.code == 2
        assert option.strip("-") in got.err
        assert not out.exists()

    def test_used_output_folders(
        self,
        cli: Cli,
        tmp_path: Path,
        tiny_teacher: Path,
        tiny_student: Path,
        text_file: Path,
        bucket_cache: Path,
    ) -> None:
        (tmp_path / "mine.txt").write_text("keep me")
        for words in (
            ("cache", "--teacher", tiny_teacher, "--data", text_file),
            ("train", "--student", tiny_student, "--cache", bucket_cache),
            ("init-student", "--teacher", tiny_teacher, "--num-layers", 2),
        ):
            got = cli(*words, "--out", tmp_path)
            assert got.code == 2
            assert str(tmp_path) in got.err
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_an_unknown_option_is_wrong_usage(self, cli: Cli) -> None:
        assert cli("cache", "--no-such-option").code == 2


class TestStudent:
    def test_another_tokenizer(self, cli: Cli, out: Path, bucket_cache: Path, tmp_path: Path) -> None:
        other = build_tiny_model(tmp_path / "other", tokenizer_size=300)
        got = cli("train", "--student", other, "--cache", bucket_cache, "--out", out)
        assert got.code == 1
        assert "tokenizer that the cache was made with" in got.err
        assert not out.exists()

    def test_too_small_a_vocabulary(
        self, cli: Cli, out: Path, bucket_cache: Path, tiny_student: Path, tmp_path: Path
    ) -> None:
        small = build_tiny_model(tmp_path / "small", vocab_size=288, tokenizer_size=320)
        got = cli("train", "--student", small, "--cache", bucket_cache, "--out", out)
        assert got.code == 1
        assert "must have room for the 320 cached token ids, found a vocabulary of 288" in got.err
        assert not out.exists()

    def test_no_such_layer(self, cli: Cli, out: Path, tiny_teacher: Path) -> None:
        got = cli("init-student", "--teacher", tiny_teacher, "--keep-layers", "0,9", "--out", out)
        assert got.code == 2
        assert "from 0 to 3" in got.err
        assert not out.exists()


class TestCache:
    @pytest.fixture
    def damaged(self, bucket_cache: Path, tmp_path: Path) -> Path:
        copy = Path(shutil.copytree(bucket_cache, tmp_path / "copy"))
        shard = sorted((copy / "shards").iterdir())[1]
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0x10
        shard.write_bytes(content)
        return copy

    def test_a_flipped_bit_stops_training(
        self, cli: Cli, out: Path, damaged: Path, tiny_student: Path
    ) -> None:
        got = cli("train", "--student", tiny_student, "--cache", damaged, "--out", out, "--iters", 50)
        assert got.code == 1
        assert "targets-00001" in got.err
        assert not (out / "model").exists()

    def test_verify_names_it_and_repair_and_resume_mend_it(
        self, cli: Cli, damaged: Path, bucket_cache: Path, tiny_teacher: Path, text_file: Path
    ) -> None:
        got = cli("verify", damaged, "--json")
        assert got.code == 1
        assert got.json["damaged_shards"] == [1]
        assert "targets-00001" in got.json["findings"][0]["path"]
        assert cli("repair", damaged, "--json").json["shards"] == [1]
        # All as in the fixture, the chunk too: matrix products of other shapes round differently.
        words = ("--tail", "bucket", "--max-seq-len", 64, "--batch-size", 4, "--sequences-per-shard", 8)
        words += ("--head-chunk", 50)
        resumed = cli(
            "cache",
            "--teacher",
            tiny_teacher,
            "--data",
            text_file,
            "--out",
            damaged,
            "--resume",
            *words,
            "--json",
        )
        assert resumed.code == 0, resumed.err
        assert cli("verify", damaged).code == 0
        names = sorted(path.name for path in (bucket_cache / "shards").iterdir())
        assert sorted(path.name for path in (damaged / "shards").iterdir()) == names

    def test_resuming_with_other_settings_says_what_differs(
        self, cli: Cli, bucket_cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
    ) -> None:
        copy = shutil.copytree(bucket_cache, tmp_path / "copy")
        words = ("cache", "--teacher", tiny_teacher, "--data", text_file, "--out", copy, "--resume")
        got = cli(*words, "--tail", "bucket", "--max-seq-len", 32, "--sequences-per-shard", 8)
        assert got.code == 1
        assert "data" in got.err
        assert "max_sequence_length" in got.err

    def test_not_a_cache(self, cli: Cli, tmp_path: Path) -> None:
        for command in ("inspect", "verify", "repair"):
            got = cli(command, tmp_path)
            assert got.code == 2
            assert "must be a cache folder" in got.err

    def test_inspecting_what_is_not_there(self, cli: Cli, bucket_cache: Path) -> None:
        assert cli("inspect", bucket_cache, "--sequence", 999).code == 2
        assert cli("inspect", bucket_cache, "--sequence", 0, "--position", 64).code == 2
        assert cli("inspect", bucket_cache, "--sequence", 0, "--temperature", 0).code == 2


def test_json_lines_stay_json(cli: Cli, bucket_cache: Path) -> None:
    facts = cli("inspect", bucket_cache, "--json")
    assert json.loads(facts.out)["target"]["tail"] == "bucket"
    assert facts.err == ""


BEFORE_TRAINING = [
    (("--seed", 1 << 64), "seed: must be at most 9,223,372,036,854,775,807"),
    (("--warmup", 10**30), "warmup: must be at most 2,147,483,647"),
    (("--iters", 10**30), "iters: must be at most"),
    ({"optimizer_config": {"adamw": {"betas": [0.9]}}}, "betas of adamw: must be two numbers in [0, 1)"),
    ({"optimizer_config": {"adam": {"betas": [5, 9]}}}, "betas of adam: must be two numbers in [0, 1)"),
    ({"optimizer_config": {"adam": {"eps": -1.0}}}, "optimizer_config: adam must get options it knows"),
    (
        {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 10**20]}},
        "arguments: must be numbers up to",
    ),
]


@pytest.mark.parametrize(("given", "found"), BEFORE_TRAINING)
def test_numbers_that_mlx_does_not_take(
    cli: Cli, tiny_student: Path, bucket_cache: Path, tmp_path: Path, given: Any, found: str
) -> None:
    words = given
    if isinstance(given, dict):
        (tmp_path / "c.yaml").write_text(json.dumps(given))
        names = list(given.get("optimizer_config", {}))
        words = ("-c", tmp_path / "c.yaml", *(("--optimizer", names[0]) if names else ()))
    got = cli("train", "--student", tiny_student, "--cache", bucket_cache, "--out", tmp_path / "r", *words)
    assert got.code == 2
    assert found in got.err
    assert len(got.err.strip().splitlines()) == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_pipes_and_devices_are_no_text(cli: Cli, tiny_teacher: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "text.jsonl"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "link to a device":
        place.symlink_to("/dev/zero")
    else:
        place = Path("/dev/zero")
    got = cli("cache", "--teacher", tiny_teacher, "--data", place, "--out", tmp_path / "c")
    assert got.code == 1
    assert "must be a file or folder, found a pipe or device" in got.err


def test_a_small_parquet_file_that_holds_much_text(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.parquet"
    pq.write_table(pa.table({"text": ["a" * (257 << 20)]}), text, compression="zstd", use_dictionary=False)
    assert text.stat().st_size < 50_000
    got = cli("cache", "--teacher", tiny_teacher, "--data", text, "--out", tmp_path / "c")
    assert got.code == 1
    assert "text.parquet:1: a text must have at most 268,435,456 characters" in got.err


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))", "open files: mlx_lm must be allowed 4,096"),
        ("pipeline.cache.run_cache = lambda *_: bytearray(1 << 62)", "memory: must suffice for the command"),
        ("threading.Thread.start = start", "threads: must be to be had"),
    ],
)
def test_a_system_that_gives_no_more(tiny_teacher: Path, tmp_path: Path, limit: str, found: str) -> None:
    code = f"""
import resource, threading
import pipeline.cache
from pipeline.cli import main
def start(self):
    raise RuntimeError("can't start new thread")
{limit}
main(["cache", "--teacher", {str(tiny_teacher)!r}, "--data", "x.txt", "--out", {str(tmp_path / "c")!r}])
"""
    (tmp_path / "x.txt").write_text("some text " * 100)
    words = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {found}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("tarin", "train"), ("init_student", "init-student"), ("Cache", "cache")]
)
def test_a_mistyped_command_gets_a_suggestion(cli: Cli, typed: str, meant: str) -> None:
    got = cli(typed, "--out", "x")
    assert got.code == 2
    assert f"no command '{typed}'; did you mean '{meant}'?" in got.err

"""Every example runs, on a tiny model, and says what is true."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import numpy as np
import pytest

from examples import custom_loop
from examples.read_cache import rows
from pipeline.cache import run_cache
from pipeline.cli import group
from pipeline.config import load_config, resolve
from pipeline.console import Console
from pipeline.reporting.entropy import entropy
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.training.run import run_train
from pmetal_distill import load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pages import ROOT
from tests.tiny import SENTENCES

EXAMPLES = ROOT / "examples"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def cache(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents in sequences of 64 tokens."""
    folder = tmp_path_factory.mktemp("examples")
    lines = [json.dumps({"text": SENTENCES[n % 6] * (1 + n % 3)}) for n in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    settings = CacheSettings(
        teacher=str(tiny_teacher),
        data=str(folder / "text.jsonl"),
        out=folder / "cache",
        max_seq_len=64,
        sketch_rank=8,
        sequences_per_shard=8,
    )
    run_cache(settings, QUIET)
    return folder / "cache"


def printed(script: str, cache: Path) -> str:
    """What a script says about a cache."""
    command = [sys.executable, str(EXAMPLES / script), str(cache)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_example_is_in_the_index() -> None:
    index = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"| `{path.name}" in index


def test_rows_are_those_of_the_teacher(cache: Path, tiny_teacher: Path) -> None:
    opened, found, at = LogitCache(cache), rows(cache), 0
    teacher = load_model(tiny_teacher)
    assert opened.dataset.num_shards > 1
    for number in range(opened.num_sequences):
        stored = opened.sequence(number)
        positions = np.flatnonzero(stored.loss_mask)
        part = {name: column[at : at + len(positions)] for name, column in found.items()}
        at += len(positions)
        np.testing.assert_array_equal(part["seq"], number)
        np.testing.assert_array_equal(part["pos"], positions)
        np.testing.assert_array_equal(part["doc"], stored.documents[positions])
        np.testing.assert_array_equal(part["token"], stored.token_ids[positions])
        np.testing.assert_array_equal(part["next_token"], np.append(stored.token_ids, -1)[positions + 1])
        expected = entropy(stored.targets[positions], opened.spec, temperature=1.0)
        np.testing.assert_allclose(part["entropy"], expected[0], atol=1e-4)
        documents = mx.array(stored.documents[None])
        logits = np.array(teacher.full(mx.array(stored.token_ids[None]), documents=documents)[0], np.float64)
        logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[positions]
        np.testing.assert_array_equal(part["choice"], logprobs.argmax(axis=1))
        np.testing.assert_allclose(part["probability"], np.exp(logprobs.max(axis=1)), atol=0.01)
        exact = -(np.exp(logprobs) * logprobs).sum(axis=1)
        np.testing.assert_allclose(part["entropy"], exact, atol=0.15)
        assert np.abs(part["entropy"] - exact).mean() < 0.03
    assert at == len(found["seq"]) == opened.num_trained_tokens


def test_duckdb_answers(cache: Path) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    out, opened, found = printed("read_cache_duckdb.py", cache), LogitCache(cache), rows(cache)
    sizes = opened.bytes_per_token()
    columns = re.findall(r"^  (\w+) +([\d.]+) bytes a token", out, re.MULTILINE)
    assert columns[0][0] == max((n for n in sizes if re.fullmatch(r"[a-z]+\d*", n)), key=sizes.__getitem__)
    assert {n: float(size) for n, size in columns} == pytest.approx(
        {n: sizes[n] for n, _ in columns}, abs=1e-3
    )
    longest = re.search(r"longest documents\n  sequence (\d+) document (\d+): (\d+) tokens, (\d+) with", out)
    assert longest is not None
    seq, doc, tokens, trained = map(int, longest.groups())
    stored = opened.sequence(seq)
    assert tokens == (stored.documents == doc).sum() == 64
    assert trained == stored.loss_mask[stored.documents == doc].sum()
    assert_most_unsure(out, found)


def test_polars_answers(cache: Path) -> None:
    pytest.importorskip("polars", reason="polars is not installed")
    out, found = printed("read_cache_polars.py", cache), rows(cache)
    known = found["next_token"] >= 0
    right = (found["choice"] == found["next_token"])[known].mean()
    assert f"the first choice is the next token in {right:.4f} of {known.sum():,}" in out
    bins = re.findall(r"^  0\.\d to \d\.\d: (\d+) tokens", out, re.MULTILINE)
    assert sum(map(int, bins)) == known.sum()
    assert_most_unsure(out, found)


def assert_most_unsure(out: str, found: dict[str, np.ndarray[Any, Any]]) -> None:
    """The first document and the first token are those with the largest (mean) entropy."""
    document = re.search(r"unsure\n  sequence (\d+) document (\d+): ([\d.]+) nats over (\d+) tokens", out)
    token = re.search(r"unsure\n  sequence (\d+) position (\d+): ([\d.]+) nats after", out)
    assert document is not None
    assert token is not None
    keys = list(zip(found["seq"].tolist(), found["doc"].tolist(), strict=True))
    means = {key: found["entropy"][[k == key for k in keys]].mean() for key in keys}
    worst = max(means, key=means.__getitem__)
    assert (int(document[1]), int(document[2])) == worst
    assert float(document[3]) == pytest.approx(means[worst], abs=1e-3)
    assert int(document[4]) == keys.count(worst)
    top = int(found["entropy"].argmax())
    assert (int(token[1]), int(token[2])) == (found["seq"][top], found["pos"][top])


def test_a_loop_of_ones_own_resumes_exactly(
    cache: Path, tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(out: str, updates: int) -> None:
        words = ["--cache", cache, "--student", tiny_student, "--out", tmp_path / out, "--updates", updates]
        custom_loop.main([str(word) for word in words])

    train("whole", 7)
    train("parts", 6)
    kept = sorted((tmp_path / "parts" / "checkpoints").glob("*.safetensors"))
    assert [path.name[:8] for path in kept] == ["00000005", "00000006"]
    kept[-1].unlink()  # as if it had been killed before
    capsys.readouterr()
    train("parts", 7)
    assert "going on behind update 5" in capsys.readouterr().out
    for name in ("log.csv", "model-7/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = list(csv.reader((tmp_path / "whole" / "log.csv").read_text().splitlines()))
    assert [line[0] for line in lines] == ["update", *map(str, range(1, 8))]
    assert float(lines[-1][2]) < float(lines[1][2])


def stages(name: str, teacher: Path, student: Path, out: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    """Both files of an example, with its models replaced; the cache and what `train` returned."""
    cache = out / "cache"
    small = {"teacher": str(teacher), "out": cache, "sketch_rank": 8, **changes}
    run_cache(
        resolve(CacheSettings, load_config(EXAMPLES / name / "cache.yaml", CacheSettings), small), QUIET
    )
    few = {
        "student": str(student),
        "cache": str(cache),
        "out": out / "run",
        "iters": 3,
        "steps_per_report": 1,
    }
    settings = resolve(TrainSettings, load_config(EXAMPLES / name / "train.yaml", TrainSettings), few)
    return cache, run_train(settings, QUIET)


def test_only_answers_of_chats_are_trained(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    data = EXAMPLES / "chat" / "train.jsonl"
    place, result = stages("chat", tiny_teacher, tiny_student, tmp_path, data=str(data))
    cache, tokenizer = LogitCache(place), load_model(tiny_teacher).tokenizer
    trained = ""
    for number in range(cache.num_sequences):
        stored = cache.sequence(number)
        answers = np.flatnonzero(stored.loss_mask) + 1
        trained += tokenizer.decode(stored.token_ids[answers[answers < len(stored)]].tolist())
    for line in data.read_text().splitlines():
        *prompt, answer = json.loads(line)["messages"]
        assert answer["content"] in trained
        assert not any(message["content"] in trained for message in prompt if message["role"] == "user")
    assert 0 < cache.num_trained_tokens < cache.num_tokens / 2
    assert np.isfinite(result["loss"])


def test_hidden_states_pull_the_student(tiny_student: Path, tmp_path: Path) -> None:
    from tests.tiny import build_tiny_model

    teacher = build_tiny_model(tmp_path / "teacher", num_layers=24)
    (tmp_path / "text.txt").write_text(SENTENCES[1] * 60)
    data = str(tmp_path / "text.txt")
    place, result = stages("hidden_alignment", teacher, tiny_student, tmp_path, data=data, hidden_rank=16)
    hidden = LogitCache(place).dataset.hidden
    assert hidden is not None
    assert hidden.layers == (5, 11, 17, 23)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["hidden"] > 0 for line in lines)
    assert result["hidden"] == lines[-1]["hidden"]


def test_the_recipe_for_a_mac_has_only_options_that_exist() -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS

    cache = resolve(CacheSettings, load_config(EXAMPLES / "mac" / "cache.yaml", CacheSettings), {})
    train = resolve(TrainSettings, load_config(EXAMPLES / "mac" / "train.yaml", TrainSettings), {})
    assert train.cache == str(cache.out)
    assert cache.mask_prompt
    assert train.iters == 8000
    of_mlx_lm = (EXAMPLES / "mac" / "train.yaml").read_text().split("\n\n")[0]
    keys = re.findall(r"^(\w+):", of_mlx_lm, re.MULTILINE)
    assert "learning_rate" in keys
    assert set(keys) <= CONFIG_DEFAULTS.keys()


def test_the_commands_of_the_recipe_parse() -> None:
    page = (EXAMPLES / "README.md").read_text()
    commands = re.findall(r"^pmetal-pipeline +(\S+) +(.*)$", page, re.MULTILINE)
    assert [name for name, _ in commands] == ["plan", "cache", "train", "eval"]
    for name, options in commands:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        parsed = command.make_context(name, shlex.split(options))
        config = parsed.params.get("config")
        assert config is None or (ROOT / config).is_file()

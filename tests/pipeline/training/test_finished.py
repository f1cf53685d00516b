"""A finished run is what it wrote: whoever reads it says which file was changed, and never in a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline.conftest import Cli
from tests.pipeline.training.runs import run_settings, train

DEEP = b'{"loss": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
Told = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tiny_student: Path, short_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(run_settings(student=tiny_student, cache=short_cache, out=out, iters=4, fuse=True))
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def told(cli: Cli, run: Path, tiny_student: Path, short_cache: Path, tmp_path: Path) -> Told:
    """The one line that a command says of the run, and that its exit code is 1."""
    as_begun = ("--iters", 4, "--batch-size", 2, "--learning-rate", 1e-3, "--val-share", 0.2)
    places = ("--student", tiny_student, "--cache", short_cache, "--out", run)
    options = {
        "resume": ("train", *places, *as_begun, "--resume"),
        "eval": ("eval", run, "--cache", short_cache),
        "eval of the model": ("eval", run / "model", "--cache", short_cache),
        "status": ("status", run),
        "report": ("report", run, "--out", tmp_path / "report.html"),
    }

    def of(command: str, *, code: int = 1) -> str:
        found = cli(*options[command])
        assert found.code == code, found.err
        assert "Traceback" not in found.err
        return found.err if code == 0 else found.err.strip().splitlines()[-1]

    return of


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("result.json", ("resume", "status", "report")),
        ("metrics.jsonl", ("resume", "status", "report")),
        ("model/model.safetensors", ("resume", "eval", "eval of the model")),
        ("model/config.json", ("resume", "eval", "eval of the model")),
    ],
)
def test_a_changed_file_is_named_by_whoever_reads_it(
    run: Path, told: Told, name: str, commands: tuple[str, ...]
) -> None:
    for command in commands:
        told(command, code=0)
    data = (run / name).read_bytes()
    changed = data.replace(b"1", b"2", 1) if name.endswith(("json", "jsonl")) else b""
    if changed:
        (run / name).write_bytes(changed)
    else:
        flip(run / name)
    for command in commands:
        line = told(command)
        assert f"{run / name}: must have the bytes that the run wrote" in line
        assert "restore it from a copy, or remove" in line
    (run / "hashes.json").unlink()
    for command in {*commands} - {"eval", "eval of the model"}:
        told(command, code=0)  # as a run of before there were hashes


def test_what_people_may_change(run: Path, told: Told) -> None:
    for name in ("README.md", "model/README.md", "config.yaml"):
        with (run / name).open("a") as file:
            file.write("# mine\n")
    for command in ("resume", "status", "report", "eval"):
        told(command, code=0)


def test_adapters_that_were_changed(cli: Cli, tiny_student: Path, short_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lora = {"fine_tune_type": "lora", "num_layers": 1}
    train(run_settings(student=tiny_student, cache=short_cache, out=out, iters=2, **lora))
    assert cli("eval", out, "--cache", short_cache).code == 0
    flip(out / "adapters.safetensors")
    found = cli("eval", out, "--cache", short_cache)
    assert found.code == 1
    assert "adapters.safetensors: must have the bytes that the run wrote" in found.err


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "found nothing"),
        (b'{"loss": 1', "found no JSON"),
        (b"\0" * 40, "found no JSON"),
        (b"\xff\xfe{}", "found no JSON"),
        (DEEP, "found JSON that is nested too deeply"),
        (b"[1, 2]", "found a list"),
    ],
    ids=["empty", "cut", "NUL", "UTF-8", "deep", "list"],
)
def test_a_result_that_is_none(run: Path, told: Told, data: bytes, found: str) -> None:
    (run / "result.json").write_bytes(data)
    (run / "hashes.json").unlink()
    line = told("resume")
    assert "result.json: must be the JSON object that the run wrote" in line
    assert found in line
    (run / "hashes.json").write_bytes(data)
    (run / "result.json").write_text("{}")
    if data:
        assert "hashes.json: must" in told("status")


BAD = {
    "NaN": ("status", '{"iteration": 4, "loss": NaN, "seconds": 1.0}', "found loss = nan"),
    "a string": ("status", '{"iteration": "4", "loss": 1.0, "seconds": 1.0}', "found iteration = 4"),
    "a huge number": (
        "status",
        f'{{"iteration": 4, "loss": 1{"0" * 400}, "seconds": 1}}',
        "found loss = 1000",
    ),
    "missing": ("status", '{"iteration": 4, "loss": 1.0}', "found no 'seconds'"),
    "deep": ("status", DEEP.decode(), "nested too deeply"),
    "no JSON": ("status", "abc", "no JSON"),
    "deep in a report": ("report", DEEP.decode(), "must be a JSON object with an iteration"),
    "no number in a report": ("report", '{"iteration": "4"}', "must be a JSON object with an iteration"),
    "a huge iteration": (
        "report",
        f'{{"iteration": 1{"0" * 400}}}',
        "must be a JSON object with an iteration",
    ),
}


@pytest.mark.parametrize(("command", "line", "found"), list(BAD.values()), ids=list(BAD))
def test_metrics_that_are_none(run: Path, told: Told, command: str, line: str, found: str) -> None:
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text(line + '\n{"iteration": 5, "val_loss": 1.0}\n')
    said = told(command)
    assert "metrics.jsonl:1: must be a JSON object" in said
    assert found in said


def test_resuming_over_metrics_that_are_none_drops_them(run: Path, told: Told) -> None:
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join([DEEP.decode(), f'{{"iteration": 1{"0" * 400}}}', "7", *lines])
    )
    told("resume", code=0)
    kept = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in kept] == [
        json.loads(line)["iteration"] for line in lines
    ]

"""`init-student`: every way to a student, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.new_student import SAMPLE_LENGTH, NewStudent
from pipeline.text import packed_text
from pmetal_distill.models import load_model
from pmetal_distill.students import block_influence, neuron_importance
from pmetal_distill.teaching import TextBatch
from schemas.errors import UsageError
from tests.pipeline.conftest import Cli
from tests.tiny import tiny_config


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "student"


@pytest.fixture
def short_text(text_file: Path, tmp_path: Path) -> Path:
    """Few enough tokens that all of them are measured on."""
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(text_file.read_text().splitlines()[:12]))
    return path


def whole_text(teacher: Path, text: Path) -> list[TextBatch]:
    """All of a small text, a sequence at a time."""
    data = packed_text(str(text), load_model(teacher), split="train", max_seq_len=SAMPLE_LENGTH)
    rows = [data.sequence(number) for number in range(data.num_sequences)]
    assert len(rows) <= 4
    return [
        TextBatch(r.token_ids[None], r.documents[None], r.loss_mask[None], r.token_ids[None]) for r in rows
    ]


def test_half_of_the_layers_by_default(cli: Cli, tiny_teacher: Path, out: Path) -> None:
    got = cli("init-student", "--teacher", tiny_teacher, "--out", out, "--json")
    assert got.json["kept_layers"] == [0, 3]
    assert got.json["weights_bytes"] == (out / "model.safetensors").stat().st_size
    assert load_model(out).num_layers == got.json["layers"] == 2


@pytest.mark.parametrize("option", ["--layers", "--keep-layers"])
def test_chosen_layers(cli: Cli, option: str, tiny_teacher: Path, out: Path) -> None:
    got = cli("init-student", "--teacher", tiny_teacher, option, "0,2,-1", "--out", out, "--json")
    assert got.json["kept_layers"] == [0, 2, 3]
    assert load_model(out).num_layers == 3


def test_layers_by_importance(cli: Cli, tiny_teacher: Path, short_text: Path, out: Path) -> None:
    words = ("--num-layers", 3, "--by", "importance", "--data", short_text, "--out", out)
    got = cli("init-student", "--teacher", tiny_teacher, *words, "--json")
    assert got.code == 0, got.err
    influence = block_influence(load_model(tiny_teacher), whole_text(tiny_teacher, short_text))
    assert got.json["kept_layers"] == sorted(np.argsort(influence)[1:].tolist())
    assert "measuring: 1/1 layers" in got.err
    assert load_model(out).num_layers == 3


@pytest.mark.parametrize(("width", "neurons"), [("24", 24), ("0.5", 32), ("0.1", 32)])
def test_narrower_mlps(
    cli: Cli, width: str, neurons: int, tiny_teacher: Path, short_text: Path, out: Path
) -> None:
    got = cli(
        "init-student", "--teacher", tiny_teacher, "--mlp-width", width, "--data", short_text, "--out", out,
        "--json",
    )  # fmt: skip
    assert got.code == 0, got.err
    assert (got.json["layers"], got.json["mlp_width"]) == (4, neurons)
    teacher, student = load_model(tiny_teacher), load_model(out)
    scores = neuron_importance(teacher, whole_text(tiny_teacher, short_text))
    kept = np.sort(np.argsort(-scores[2])[:neurons])
    np.testing.assert_array_equal(
        np.array(student.model.layers[2].mlp.up_proj.weight),
        np.array(teacher.model.layers[2].mlp.up_proj.weight)[kept],
    )


def test_a_fresh_one(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    config = tmp_path / "small.json"
    words = ("init-student", "--teacher", tiny_teacher, "--from-config", config, "--json", "--out")
    for width, rows in ((32, 320), (16, 0)):
        config.write_text(json.dumps(tiny_config(hidden_size=width, num_layers=1)))
        got = cli(*words, tmp_path / str(width))
        assert got.code == 0, got.err
        assert (got.json["layers"], got.json["embedding_rows"]) == (1, rows)
        assert load_model(tmp_path / str(width)).hidden_size == width
    same = cli(*words, tmp_path / "same")
    other = cli(*words, tmp_path / "other", "--seed", 1)
    assert same.code == other.code == 0
    first, second, third = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("16", "same", "other")
    )
    assert first == second != third


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 2, "keep_layers": (0,)}, "--num-layers, --layers: at most one"),
        ({"by": "importance", "data": "text"}, "add --num-layers"),
        ({"by": "importance", "num_layers": 2}, "text to measure on, found none; add --data"),
        ({"mlp_width": 0.5}, "add --data"),
        ({"data": "text"}, "found nothing to measure"),
        ({"mlp_width": 0.0, "data": "text"}, "mlp_width: must be a number of neurons or a share below 1"),
        ({"mlp_width": 7.5, "data": "text"}, "found 7.5"),
        ({"from_config": Path("c.json"), "num_layers": 2}, "--from-config: a fresh student must take"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NewStudent("teacher", Path("out"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mlp-width", "65", "--data", "TEXT"), "mlp_width: must be from 1 to 64"),
        (
            ("--num-layers", "5", "--by", "importance", "--data", "TEXT"),
            "from 1 to 4, the teacher's, found 5",
        ),
        (("--from-config", "TEXT"), "must be a config.json"),
        (("--from-config", "missing.json"), "must be a config.json"),
    ],
)
def test_what_the_teacher_does_not_have(
    cli: Cli, words: tuple[str, ...], message: str, tiny_teacher: Path, short_text: Path, out: Path
) -> None:
    given = [str(short_text) if word == "TEXT" else word for word in words]
    got = cli("init-student", "--teacher", tiny_teacher, *given, "--out", out)
    assert got.code == 2
    assert message in got.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"model_type": "llama", "x": ' + "[" * 100_000, "config.json, found"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "'num_hidden_layers' must be from 1"),
    ],
)
def test_a_configuration_that_cannot_be_built(
    cli: Cli, tiny_teacher: Path, out: Path, tmp_path: Path, text: str, found: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    words = ("--teacher", tiny_teacher, "--from-config", tmp_path / "config.json", "--out", out)
    got = cli("init-student", *words)
    assert got.code in (1, 2)
    assert found in got.err
    assert len(got.err.strip().splitlines()) == 1


def test_a_full_disk(tiny_teacher: Path, out: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); from pipeline.cli import main; "
        f"main(['init-student', '--teacher', {str(tiny_teacher)!r}, '--out', {str(out)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "could not be written in full" in done.stderr
    assert not list(out.parent.iterdir())

"""The report of a run shows its curves, and its student beside the teacher."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pipeline.console import Console
from pipeline.reporting.build import ReportOptions, build_report
from pipeline.reporting.run_report import RunInputs, run_report
from pipeline.settings import TrainSettings
from pipeline.training.run import run_train
from pipeline.training.source import Holdout
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.rebuild import reconstruct_logprobs
from tests.pipeline.conftest import Cli
from tests.pipeline.reporting.conftest import tips
from tests.pipeline.reporting.test_markup import Parsed

EVALUATION = {
    "kl@1": 1.25,
    "top1": 0.5,
    "ece": 0.0625,
    "reliability": [
        {"above": 0.0, "confidence": 0.125, "accuracy": 0.25, "tokens": 10},
        {"above": 0.5, "confidence": 0.75, "accuracy": 0.5, "tokens": 30},
        {"above": 0.9, "confidence": 0.96875, "accuracy": 0.0, "tokens": 1},
    ],
    "by_position": [{"position": "<b>0-15</b>", "kl@1": 2.5}, {"position": "16-63", "kl@1": 1.5}],
    "later": {"more": 1},
}


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("out")
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    options = ReportOptions(str(run_folder), folder / "run.html", evaluation=folder / "eval.json")
    result = build_report(options, Console(quiet=True))
    assert result["skipped"] == {}
    return (folder / "run.html").read_text()


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_curves_are_those_of_the_metrics(run_folder: Path) -> None:
    report = run_report(RunInputs(run_folder, None), footer="")
    figures = {figure.name: figure for figure in report.figures}
    reported = [line for line in lines(run_folder) if "loss" in line]
    assert [row[:2] for row in figures["losses"].table.rows] == [
        [line["iteration"], line["loss"]] for line in reported
    ]
    assert {"learning-rate", "temperature", "alpha", "speed", "waiting"} <= figures.keys()
    evaluated = [line for line in lines(run_folder) if "val_kl@1" in line]
    assert evaluated
    header = list(figures["held-out-kl"].table.header)
    assert header[1:] == ["T = 1", "T = 2"]
    assert [row[1] for row in figures["held-out-kl"].table.rows] == [line["val_kl@1"] for line in evaluated]
    assert [row[1] for row in figures["agreement"].table.rows] == [line["val_top1"] for line in evaluated]


def test_speed_is_that_between_reports(run_folder: Path) -> None:
    report = run_report(RunInputs(run_folder, None), footer="")
    (figure,) = [f for f in report.figures if f.name == "speed"]
    reported = [line for line in lines(run_folder) if "tokens" in line]
    one, two = reported[1], reported[2]
    rate = (two["tokens"] - one["tokens"]) / (two["seconds"] - one["seconds"])
    assert figure.table.rows[2][1] == pytest.approx(rate)


def test_divergence_of_held_out_tokens(page: str, run_folder: Path, attacked_cache: Path) -> None:
    """Against the dense distributions of both, in float64."""
    cache, student = LogitCache(attacked_cache), load_model(run_folder / "model")
    split = Holdout.of(cache.numbers, share=0.2, seed=0, text=cache.text)
    row = cache.sequence(int(split.held_out[0]))
    assert f"sequence {row.number}" in page
    (basis,) = cache.bases
    teacher = reconstruct_logprobs(row.targets, cache.spec, temperature=1.0, basis=basis).astype(np.float64)
    logits = np.array(
        student.full(mx.array(row.token_ids[None]), documents=row.documents[None])[0], np.float64
    )
    logits -= logits.max(axis=1, keepdims=True)
    logq = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    kl = (np.exp(teacher) * (teacher - logq)).sum(axis=1)
    positions = [
        p for p in range(len(row) - 1) if row.loss_mask[p] and row.documents[p] == row.documents[p + 1]
    ]
    for shown, position in zip(tips(page), positions, strict=False):
        said = float(shown["heading"].partition("divergence ")[2].split()[0])
        assert said == pytest.approx(kl[position], abs=0.006)
        student_choices = dict(shown["lists"])["the student expected"]
        best = np.sort(np.exp(logq[position]))[::-1][:5]
        assert [choice[1] for choice in student_choices] == pytest.approx(best.tolist(), abs=1e-3)


def test_evaluation_is_shown(page: str) -> None:
    text = "".join(Parsed(page).text)
    assert "Expected calibration error: 0.0625 against the text." in text
    assert "<b>0-15</b>" in text
    report = run_report(RunInputs(Path("nowhere"), EVALUATION), footer="")
    figures = {figure.name: figure for figure in report.figures}
    rows = [list(row) for row in figures["calibration"].table.rows]
    assert rows == [["the text", 0.125, 0.25, 10], ["the text", 0.75, 0.5, 30], ["the text", 0.96875, 0.0, 1]]
    drawn = figures["calibration"].element().render()
    assert "0.5 at " in drawn
    assert "0 at probability" not in drawn, "one token is no share"
    assert [list(row) for row in figures["kl-by-position"].table.rows] == [
        ["<b>0-15</b>", 2.5],
        ["16-63", 1.5],
    ]


def test_the_command_eval_gives_all_of_it(
    cli: Cli, run_folder: Path, attacked_cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    teacher = ("--teacher", tiny_teacher, "--data", text_file, "--split", "train")
    for source in (("--cache", attacked_cache), teacher):
        got = cli("eval", run_folder, *source, "--json")
        assert got.code == 0, got.err
        report = run_report(RunInputs(run_folder, got.json), footer="")
        assert {"calibration", "kl-by-position"} <= {figure.name for figure in report.figures}


def test_held_out_text_is_named_as_such(page: str) -> None:
    text = "".join(Parsed(page).text)
    assert "held-out sequences of the cache" in text
    assert "was trained on this text" not in text


class TestMissing:
    def skipped(self, run: Path) -> dict[str, str]:
        return run_report(RunInputs(run, None), footer="").skipped

    def test_a_run_without_its_cache(self, run_folder: Path, tmp_path: Path) -> None:
        run = Path(shutil.copytree(run_folder, tmp_path / "run"))
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace("cache: ", "cache: gone/", 1))
        assert "not at gone/" in self.skipped(run)["student"]

    def test_a_moved_run_finds_the_cache_beside_it(
        self, run_folder: Path, attacked_cache: Path, tmp_path: Path
    ) -> None:
        run = Path(shutil.copytree(run_folder, tmp_path / "run"))
        config = (run / "config.yaml").read_text().replace(str(attacked_cache), "elsewhere/cache", 1)
        (run / "config.yaml").write_text(config)
        shutil.copytree(attacked_cache, tmp_path / "cache")
        assert "student" not in self.skipped(run)

    def test_a_run_in_progress(self, run_folder: Path, tmp_path: Path) -> None:
        run = Path(shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("model")))
        assert "written none yet" in self.skipped(run)["student"]
        (run / "metrics.jsonl").unlink()
        assert {"training", "held-out", "speed"} <= self.skipped(run).keys()

    def test_a_student_of_another_vocabulary(self, run_folder: Path, tmp_path: Path) -> None:
        from tests.tiny import build_tiny_model

        run = Path(shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("model")))
        build_tiny_model(run / "model", vocab_size=300)
        assert self.skipped(run)["student"]


def test_adapters_are_put_into_the_student(
    cli: Cli, bucket_cache: Path, tiny_student: Path, tmp_path: Path
) -> None:
    settings = TrainSettings(
        student=str(tiny_student),
        cache=bucket_cache,
        out=tmp_path / "run",
        iters=2,
        fine_tune_type="lora",
        steps_per_report=1,
    )
    run_train(settings, Console(quiet=True))
    got = cli("report", tmp_path / "run", "--out", tmp_path / "r.html", "--json")
    assert got.code == 0, got.err
    assert set(got.json["skipped"]) == {"held-out", "evaluation"}
    text = "".join(Parsed((tmp_path / "r.html").read_text()).text)
    assert "lower bound" in text
    assert "was trained on this text" in text

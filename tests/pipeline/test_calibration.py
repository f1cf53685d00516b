"""Calibration on samples, and shards whose text is unlike the sample."""

import json
from pathlib import Path

import pytest

from pipeline.cache import read_data, run_cache, target_spec
from pipeline.calibration import Calibrator
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.stage_one import StageOne
from pipeline.teacher import TeacherRunner
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache

MONOTONE = "a a a a a a a a " * 4
USUAL = "The quick brown fox jumps over the lazy dog. "
STRANGE = "Der Zug fährt um 12:45 Uhr; naïve café, 東京, 🙂 def add(a, b): "


def calibrator(teacher: Path, folder: Path, name: str, texts: list[str]) -> Calibrator:
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = CacheSettings(
        teacher=str(teacher),
        data=str(data),
        out=folder / name,
        max_seq_len=64,
        batch_size=2,
        sketch_rank=10,
        sketch_step=0.25,
        calibration_tokens=400,
        sequences_per_shard=8,
    )
    model = load_model(teacher)
    runner = TeacherRunner(model, read_data(settings, model), settings.batch_size)
    return Calibrator(settings, model, runner, target_spec(settings, model.vocab_size), Console(quiet=True))


def test_a_shard_unlike_the_sample_gets_a_basis_of_its_own(tiny_teacher: Path, tmp_path: Path) -> None:
    usual = calibrator(tiny_teacher, tmp_path, "usual", [MONOTONE + str(n) for n in range(40)])
    strange = calibrator(tiny_teacher, tmp_path, "strange", [f"{n} " + STRANGE * 3 for n in range(40)])
    monitor = usual.monitor()
    at_home = usual.of_shard(monitor, range(8))
    assert at_home.basis is monitor.calibration.basis
    abroad = strange.of_shard(monitor, range(8))
    assert abroad.basis is not monitor.calibration.basis
    assert abroad.basis.rank == monitor.calibration.basis.rank
    own = strange.monitor().calibration.error[2.0].gradient
    assert abroad.error[2.0].gradient < 2 * own


def test_a_refitted_shard_is_written_with_its_basis(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = calibrator(tiny_teacher, tmp_path, "usual", [MONOTONE + str(n) for n in range(40)])
    strange = calibrator(tiny_teacher, tmp_path, "strange", [f"{n} " + STRANGE * 3 for n in range(40)])
    monitor = usual.monitor()
    monkeypatch.setattr(StageOne, "_learn", lambda self: monitor)
    run_cache(strange.settings, Console(quiet=True), teacher=strange.teacher)
    cache = LogitCache(tmp_path / "strange")
    refitted = [record for record in cache.records if record.measured["refitted"] == 1.0]
    assert refitted
    assert len(cache.bases) == len({record.basis.name for record in cache.records if record.basis})
    batch = next(cache.batches(batch_size=cache.num_sequences, seed=0))
    assert set(batch.basis_index.tolist()) == set(range(len(cache.bases)))


def test_documents_on_both_sides_are_different(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [f"{n} " + USUAL * 3 for n in range(40)])
    rows = made._rows(400)
    fit, held_back = made._split(rows, most=10_000)
    assert len(fit) + len(held_back) == len(rows) == 400
    assert len(held_back) == pytest.approx(len(rows) / 8, rel=0.5)


def test_one_document_is_split_by_position(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [USUAL * 80])
    rows = made._rows(400)
    fit, held_back = made._split(rows, most=10_000)
    assert len(held_back) == len(rows) // 8
    assert len(fit) == len(rows) - len(held_back)

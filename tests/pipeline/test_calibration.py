"""Calibration on samples, and stretches whose text is unlike the sample."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline import calibration
from pipeline.cache import read_data, run_cache, target_spec
from pipeline.calibration import Calibrator, SampledRows, cut_stretches
from pipeline.console import Console
from pipeline.settings import CacheSettings
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


def test_a_stretch_unlike_the_sample_gets_a_basis_of_its_own(tiny_teacher: Path, tmp_path: Path) -> None:
    usual = calibrator(tiny_teacher, tmp_path, "usual", [MONOTONE + str(n) for n in range(40)])
    strange = calibrator(tiny_teacher, tmp_path, "strange", [f"{n} " + STRANGE * 3 for n in range(40)])
    monitor = usual.monitor()
    at_home = usual.judge(monitor, range(8))
    assert at_home.basis is monitor.calibration.basis
    abroad = strange.judge(monitor, range(8))
    assert abroad.basis is not monitor.calibration.basis
    assert abroad.basis.rank == monitor.calibration.basis.rank
    own = strange.monitor().calibration.error[2.0].gradient
    assert abroad.error[2.0].gradient < 2 * own
    assert strange.judge(monitor, range(8)).basis.to_bytes() == abroad.basis.to_bytes()


def test_a_stretch_has_one_basis_and_a_worker_that_joins_chooses_the_same(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "STRETCH_TOKENS", 1500)
    usual = calibrator(tiny_teacher, tmp_path, "usual", [MONOTONE + str(n) for n in range(40)])
    texts = [MONOTONE + str(n) for n in range(70)] + [f"{n} " + STRANGE * 3 for n in range(20)]
    mixed = calibrator(tiny_teacher, tmp_path, "mixed", texts)
    monitor = usual.monitor()
    monkeypatch.setattr(Calibrator, "monitor", lambda self: monitor)
    settings = mixed.settings
    run_cache(settings, Console(quiet=True), teacher=mixed.teacher)

    cache = LogitCache(settings.out)
    firsts = np.cumsum([0, *(sum(map(sum, record.groups)) for record in cache.records)])[:-1]
    by_stretch: dict[int, set[str]] = {}
    for first, record in zip(firsts, cache.records, strict=True):
        assert record.basis is not None
        by_stretch.setdefault(int(first) // 1500, set()).add(record.basis.name)
    assert all(len(names) == 1 for names in by_stretch.values())
    assert len(cache.records) > len(by_stretch) > 2
    refitted = [record for record in cache.records if record.measured["refitted"] == 1.0]
    assert 0 < len(refitted) < len(cache.records)
    assert len(cache.bases) == len(list((settings.out / "bases").glob("basis-*"))) > 1
    batch = next(cache.batches(batch_size=cache.num_sequences, seed=0))
    assert set(batch.basis_index.tolist()) == set(range(len(cache.bases)))

    records = sorted((settings.out / "commits").iterdir())
    for path in (records[1], records[-1]):
        path.unlink()
    run_cache(dataclasses.replace(settings, resume=True), Console(quiet=True), teacher=mixed.teacher)
    assert LogitCache(settings.out).root == cache.root


def test_data_of_one_stretch_takes_the_calibration_as_it_is(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [f"{n} " + USUAL * 3 for n in range(40)])
    monitor = made.monitor()
    monkeypatch.setattr(Calibrator, "judge", lambda *_: pytest.fail("judged"))
    coding = made.of_stretch(monitor, made.stretches()[0])
    assert coding.sidecars.basis is monitor.calibration.basis
    assert coding.measured["kl@2"] == monitor.calibration.error[2.0].kl
    assert coding.measured["refitted"] == 0.0


def test_stretches_cover_all_shards_in_order() -> None:
    lengths = np.array([5, 9, 9, 1, 30, 2, 2, 2, 8, 9, 9])
    assert cut_stretches(lengths, 2, tokens=20) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut_stretches(lengths, 2, tokens=10**6) == [range(6)]
    assert cut_stretches(lengths, 100, tokens=1) == [range(1)]
    firsts = np.concatenate([[0], np.cumsum(lengths)])
    for stretch in cut_stretches(lengths, 1, tokens=10):
        assert len({int(firsts[shard]) // 10 for shard in stretch}) == 1


def test_a_sample_has_the_rows_that_an_even_spread_names(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [f"{n} " + USUAL * 3 for n in range(40)])
    data = made.runner.dataset
    everything = SampledRows.of(made.runner.run(range(data.num_sequences)), data.num_targets, most=10**6)
    assert len(everything) == data.num_targets
    some = SampledRows.of(made.runner.run(range(data.num_sequences)), data.num_targets, most=37)
    chosen = np.linspace(0, data.num_targets - 1, 37).astype(int)
    np.testing.assert_array_equal(some.states, everything.states[chosen])
    np.testing.assert_array_equal(some.token_ids, everything.token_ids[chosen])
    np.testing.assert_array_equal(some.documents, everything.documents[chosen])


def test_documents_on_both_sides_are_different(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [f"{n} " + USUAL * 3 for n in range(40)])
    rows = made._sampled(400)
    fit, held_back = made._split(rows, most=10_000)
    assert len(fit) + len(held_back) == len(rows) == 400
    assert len(held_back) == pytest.approx(len(rows) / 8, rel=0.5)


def test_one_document_is_split_by_position(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [USUAL * 80])
    rows = made._sampled(400)
    fit, held_back = made._split(rows, most=10_000)
    assert len(held_back) == len(rows) // 8
    assert len(fit) == len(rows) - len(held_back)

"""Calibration on samples, and stretches whose text is unlike the sample."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import calibration
from pipeline.cache import read_data, run_cache, target_spec
from pipeline.calibration import Calibrator, SampledRows, cut_stretches
from pipeline.commands.cache import summary_text
from pipeline.console import Console
from pipeline.inspection import describe, describe_text
from pipeline.settings import CacheSettings
from pipeline.stretches import Stretches
from pipeline.teacher import TeacherRunner
from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.steps import finish

MONOTONE = "a a a a a a a a " * 4
USUAL = "The quick brown fox jumps over the lazy dog. "
STRANGE = "Der Zug fährt um 12:45 Uhr; naïve café, 東京, 🙂 def add(a, b): "


class Listening(Console):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.__dict__["said"] = []

    def note(self, text: str) -> None:
        self.__dict__["said"].append(text)


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
    at_home = finish(usual.judge(monitor, range(8)))
    assert at_home.basis is monitor.calibration.basis
    abroad = finish(strange.judge(monitor, range(8)))
    assert abroad.basis is not monitor.calibration.basis
    assert abroad.basis.rank == monitor.calibration.basis.rank
    own = strange.monitor().calibration.error[2.0].gradient
    assert abroad.error[2.0].gradient < 2 * own
    assert finish(strange.judge(monitor, range(8))).basis.to_bytes() == abroad.basis.to_bytes()


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
    console = Listening()
    made = run_cache(settings, console, teacher=mixed.teacher)

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
    # What a basis of its own does not bring below the bound is said, and kept.
    assert max(record.measured["drift"] for record in refitted) > monitor.factor
    still = [text for text in console.__dict__["said"] if "the KL at T = 2 is still" in text]
    assert still
    both = [row["text"] for row in made["stretches"] if row["unlike"] and row["refitted"]]
    assert both == [text.partition(":")[0] for text in still]
    assert len(made["stretches"]) == len(by_stretch)
    assert "a basis of its own, unlike the sample" in summary_text(made)
    assert describe(settings.out)["stretches"] == made["stretches"]
    further = sum(p.stat().st_size for p in (settings.out / "bases").glob("basis-*")) - max(
        p.stat().st_size for p in (settings.out / "bases").glob("basis-*")
    )
    assert made["refit_bytes_per_token"] == pytest.approx(further / cache.num_tokens)
    assert len(cache.bases) == len(list((settings.out / "bases").glob("basis-*"))) > 1
    batch = next(cache.batches(batch_size=cache.num_sequences, seed=0))
    assert set(batch.basis_index.tolist()) == set(range(len(cache.bases)))

    records = sorted((settings.out / "commits").iterdir())
    for path in (records[1], records[-1]):
        path.unlink()
    run_cache(dataclasses.replace(settings, resume=True), Console(quiet=True), teacher=mixed.teacher)
    assert LogitCache(settings.out).root == cache.root


def test_data_of_one_stretch_takes_the_calibration_as_it_is(tiny_teacher: Path, tmp_path: Path) -> None:
    made = calibrator(tiny_teacher, tmp_path, "c", [f"{n} " + USUAL * 3 for n in range(40)])
    monitor = made.monitor()
    coding = finish(made.of_stretch(monitor, made.stretches()[0]))
    assert coding.sidecars.basis is monitor.calibration.basis
    assert coding.measured["kl@2"] == monitor.calibration.error[2.0].kl
    assert coding.measured["refitted"] == 0.0
    parts = [coding.measured[f"part{part}.kl@2"] for part in range(1, 5)]
    assert coding.measured["drift"] == pytest.approx(max(parts) / coding.measured["kl@2"], rel=0.01)


def test_the_end_of_a_short_text_is_judged(tiny_teacher: Path, tmp_path: Path) -> None:
    texts = [MONOTONE * 9 + str(n) for n in range(20)] + [f"{n} " + STRANGE * 9 for n in range(6)]
    settings = calibrator(tiny_teacher, tmp_path, "c", texts).settings
    console = Listening()
    made = run_cache(settings, console)
    assert [row["text"] for row in made["stretches"]] == [f"quarter {part}" for part in range(1, 5)]
    assert [row["unlike"] for row in made["stretches"]] == [False, False, False, True]
    (said,) = [text for text in console.__dict__["said"] if "is unlike the sample" in text]
    assert said.startswith("quarter 4 of the text is unlike the sample of all of it")
    assert "unlike the sample" in summary_text(made)
    assert "unlike the sample" in describe_text(describe(settings.out))
    records = sorted((settings.out / "commits").iterdir())
    root = LogitCache(settings.out).root
    records[-1].unlink()
    run_cache(dataclasses.replace(settings, resume=True), Console(quiet=True))
    assert LogitCache(settings.out).root == root


def test_stretches_cover_all_shards_in_order() -> None:
    firsts = np.cumsum([0, 5, 9, 9, 1, 30, 2, 2, 2, 8, 9])
    assert cut_stretches(firsts[::2], tokens=20) == [range(2), range(2, 3), range(3, 4), range(4, 6)]
    assert cut_stretches(firsts[::2], tokens=10**6) == [range(6)]
    assert cut_stretches(firsts[:1], tokens=1) == [range(1)]
    for stretch in cut_stretches(firsts, tokens=10):
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


class Recorder:
    """Stands in for a calibrator: writes down what is asked of it."""

    def __init__(self, stretches: list[range], pauses: int) -> None:
        self._stretches, self._pauses = stretches, pauses
        self.said: list[str] = []

    def stretches(self) -> list[range]:
        return self._stretches

    def forget_before(self, stretch: range) -> None:
        self.said.append(f"forget before {stretch.start}")

    def of_stretch(self, learned: Any, stretch: range) -> Any:
        for number in range(self._pauses):
            self.said.append(f"{stretch.start}: step {number}")
            yield
        self.said.append(f"{stretch.start}: done")
        return f"coding {stretch.start}"


def test_the_next_stretch_is_judged_from_the_start_of_this_one() -> None:
    made: Any = Recorder([range(4), range(4, 6), range(6, 7)], pauses=2)
    stretches, shards = Stretches(made, None, range(7)), [0, 1, 2, 3, 4, 6]
    said = []
    for shard in shards:
        made.said.append(f"shard {shard} {stretches.coding(shard)}")
        stretches.go_on(shard)
        stretches.go_on(shard)
        said, made.said = said + made.said, []
    assert said == [
        *["forget before 0", "0: step 0", "0: step 1", "0: done", "shard 0 coding 0"],
        *["4: step 0", "4: step 1", "shard 1 coding 0", "4: done", "shard 2 coding 0", "shard 3 coding 0"],
        *["forget before 4", "shard 4 coding 4", "6: step 0", "6: step 1"],
        *["forget before 6", "6: done", "shard 6 coding 6"],
    ]


def test_shards_in_any_order_get_the_coding_of_their_stretch() -> None:
    made: Any = Recorder([range(3), range(3, 5), range(5, 8)], pauses=1)
    shards = [4, 5, 6, 7, 3, 2, 1, 0]
    stretches = Stretches(made, None, shards)
    for shard in shards:
        assert stretches.coding(shard) == f"coding {0 if shard < 3 else 3 if shard < 5 else 5}"
        stretches.go_on(shard)

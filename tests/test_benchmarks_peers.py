"""The formats of benchmarks/peers.py on small random logits: what they must give back, whatever they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fidelity, peers
from benchmarks.gradients import Text, measure_errors, softmax
from benchmarks.peer_formats import (
    Dense,
    JsonLines,
    Said,
    both_renormalised,
    everything,
    log_softmax,
    mass_at_one,
    one_event,
    renormalised,
    uniform,
)
from benchmarks.peer_packages import DistillKit, Dwq, Gmlx
from benchmarks.peer_sampling import PackedSampled, Sampled
from pmetal_distill.models import load_model
from schemas.spec import TargetSpec

V = 96


@pytest.fixture
def said() -> Said:
    rng = np.random.default_rng(0)
    windows = [rng.integers(1, V, n).astype(np.int32) for n in (40, 7, 33)]
    logits = (3 * rng.normal(size=(80, V))).astype(np.float32)
    return Said(windows, logits, np.zeros((80, 8), np.float32), ["text"] * 3)


def stored(made: Any, said: Said, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    made.write(folder, said)
    return made.open(folder, said)()


def guess(temperature: float) -> np.ndarray:
    return softmax(np.random.default_rng(9).normal(size=(80, V)).astype(np.float32), temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_head_of_the_whole_vocabulary_loses_nothing(said: Said, tmp_path: Path, temperature: float) -> None:
    got = renormalised(stored(JsonLines(V), said, tmp_path), temperature, guess(temperature))
    np.testing.assert_allclose(got, softmax(said.logits, temperature), atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_json_lines_hold_the_best_in_order(said: Said, tmp_path: Path, packed: bool) -> None:
    got = stored(JsonLines(5, packed), said, tmp_path)
    order = np.argsort(-said.logits, axis=1)[:, :5]
    np.testing.assert_array_equal(got.ids, order)
    np.testing.assert_array_equal(got.logprobs, np.take_along_axis(log_softmax(said.logits), order, axis=1))


def test_dense_is_exact_but_for_float16(said: Said, tmp_path: Path) -> None:
    got = everything(stored(Dense(), said, tmp_path), 2.0, guess(2.0))
    np.testing.assert_allclose(got, softmax(said.logits, 2.0), rtol=5e-3)


@pytest.mark.parametrize("reading", [one_event, mass_at_one, uniform])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_readings_sum_to_one_and_know_the_head_at_one(
    said: Said, tmp_path: Path, reading: Any, temperature: float
) -> None:
    kept = stored(JsonLines(5), said, tmp_path)
    got = reading(kept, temperature, guess(temperature))
    np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-5)
    if temperature == 1:
        head = np.take_along_axis(got, kept.ids, axis=1)
        np.testing.assert_allclose(head, np.exp(kept.logprobs), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_unbiased(tmp_path: Path, temperature: float) -> None:
    logits = np.tile((2 * np.random.default_rng(1).normal(size=V)).astype(np.float32), (4000, 1))
    said = Said([np.ones(4000, np.int32)], logits, logits, [""])
    made = Sampled(20, temperature)
    exact = softmax(logits[:1], temperature)[0]
    got = made.shares(stored(made, said, tmp_path), temperature, np.zeros((4000, V), np.float32)).mean(axis=0)
    deviation = np.sqrt(exact * (1 - exact) / (20 * 4000))
    assert (np.abs(got - exact) < 5 * deviation).all()


def test_packed_samples_are_the_same_samples(said: Said, tmp_path: Path) -> None:
    plain, packed = Sampled(50, 2.0), PackedSampled(50, 2.0)
    kept = [stored(made, said, tmp_path / type(made).__name__) for made in (plain, packed)]
    one, two = (made.shares(k, 2.0, guess(2.0)) for made, k in zip((plain, packed), kept, strict=True))
    np.testing.assert_array_equal(one, two)
    assert [file.name for file in peers.kept(tmp_path / "PackedSampled")] == ["samples.safetensors"]


def test_a_loss_that_renormalises_both_sides_has_that_gradient(said: Said, tmp_path: Path) -> None:
    kept, q = stored(JsonLines(5), said, tmp_path), guess(2.0)
    gradient = q - both_renormalised(kept, 2.0, q)
    head = np.take_along_axis(said.logits, kept.ids, axis=1)
    guessed = np.log(np.take_along_axis(q, kept.ids, axis=1))
    expected = np.zeros_like(q)
    np.put_along_axis(expected, kept.ids, softmax(guessed, 1.0) - softmax(head, 2.0), axis=1)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_samples_add_up_and_weights_of_all_samples_are_right(said: Said, tmp_path: Path) -> None:
    made = Sampled(63, 2.0, with_logprobs=True)
    kept = stored(made, said, tmp_path)
    assert (kept.counts.sum(axis=1) == 63).all()
    many = [Sampled(63, 2.0, with_logprobs=True, seed=seed) for seed in range(60)]
    found = [m.weighted(stored(m, said, tmp_path / str(m.seed)), 1.0, guess(1.0)) for m in many]
    error = np.abs(np.mean(found, axis=0) - softmax(said.logits, 1.0)).sum(axis=1).mean()
    assert error < 0.08 < 0.2 < np.abs(found[0] - softmax(said.logits, 1.0)).sum(axis=1).mean()


def test_dwq_files_hold_every_window_in_its_place(said: Said, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    wide = (3 * rng.normal(size=(80, 1500))).astype(np.float32)
    said = Said(said.windows, wide, said.states, said.texts)
    kept = stored(Dwq(), said, tmp_path)
    best = np.sort(wide.astype(np.float16), axis=1)[:, -1024:]
    np.testing.assert_array_equal(np.sort(kept.logprobs, axis=1), best)
    np.testing.assert_allclose(kept.logprobs, np.take_along_axis(wide, kept.ids, axis=1), atol=0.01)


def test_gmlx_keeps_head_and_order(said: Said, tmp_path: Path) -> None:
    pytest.importorskip("gmlx.distill.cache")
    kept = stored(Gmlx(5), said, tmp_path)
    np.testing.assert_array_equal(kept.ids, np.argsort(-said.logits, axis=1)[:, :5])


def test_distillkit_keeps_the_head(said: Said, tmp_path: Path) -> None:
    pytest.importorskip("distillkit.compression.compressor")
    exact = {"k": 8, "exact_k": 8, "exact_dtype": "float32"}
    kept = stored(DistillKit("exact", peers.COMMON | exact), said, tmp_path)
    np.testing.assert_array_equal(kept.ids, np.argsort(-said.logits, axis=1)[:, :8])


def test_our_files_are_measured_as_fidelity_measures_them(
    tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "peers", lambda: [(Dense(), "", [("", everything, (1.0, 2.0, 4.0))])])
    teacher, student = load_model(tiny_teacher), load_model(tiny_student)
    windows = [np.arange(3, 67, dtype=np.int32), np.arange(100, 140, dtype=np.int32)]
    text: Text = fidelity.run(windows, teacher, student)
    logits = np.array(teacher.logits(fidelity.mx.array(text.states)))
    said = Said(text.windows, logits, text.states, ["", ""])
    rows = [
        fidelity.plain_row(tail, TargetSpec(teacher.vocab_size, k=8, tail=tail), text, teacher)
        for tail in ("bucket", "none")
    ]
    fidelity.evaluate(rows, text, teacher, student)
    found = peers.all_rows([peers.Ours(row) for row in rows], said, 1)
    measure_errors(found, text, teacher, student)
    for row, again in zip(rows, found, strict=False):
        assert again.result["bytes"] == pytest.approx(row.result["bytes"], rel=0.01)
        for t in (1, 2, 4):
            assert again.result[f"gradient@{t}"] == pytest.approx(row.result[f"gradient@{t}"], rel=1e-4)
    assert found[-1].result["gradient@2"] < 0.01

"""Golden caches, read by the library and by a reader made from FORMAT.md alone. They never change."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import independent_reader
import numpy as np
import pytest
import safetensors.numpy

from pipeline.calibration import HELD_BACK_TOKENS, JUDGED_HELD_BACK_TOKENS, STRETCH_TOKENS
from pmetal_distill.offline.calibrate import Calibration
from pmetal_distill.offline.fidelity import TargetError
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.rebuild import reconstruct_logprobs
from pmetal_distill.offline.verify import verify_cache
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from schemas.arrays import TargetArrays
from schemas.errors import CacheError
from schemas.tail import tail_logits

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["v1-sketch", "v1-predicted", "v1-bucket", "v1-none"]
ERROR = TargetError(kl=0.0, total_variation=0.0, gradient=0.0)
EXACT = {"ids": "head_ids", "tok": "token_ids", "doc": "documents", "msk": "loss_mask"}
CLOSE = {"logprobs": "head_logprobs", "curve": "tail_curve", "y": "coordinates"}


def expected(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def read_basis(name):
    return next((GOLDEN / name / "bases").glob("basis-*")).read_bytes()


def independent(name):
    rows = independent_reader.Cache(GOLDEN / name).rows
    assert list(rows) == list(range(len(rows)))
    return {key: np.concatenate([rows[n][key] for n in rows]) for key in rows[0]}


@pytest.mark.parametrize("name", NAMES)
def test_the_library_reads_golden_caches(name):
    want = expected(name)
    layers = tuple(int(key[6:]) for key in want if key.startswith("hidden"))
    cache = LogitCache(GOLDEN / name, hidden_layers=layers)
    start = 0
    for number, length in enumerate(want["lengths"].tolist()):
        got, part = cache.sequence(number), slice(start, start + length)
        for key in ("head_ids", "head_logprobs", "tail_curve", "coordinates"):
            np.testing.assert_allclose(getattr(got.targets, key), want[key][part], rtol=2e-6, atol=2e-6)
        for key in ("token_ids", "documents", "loss_mask"):
            np.testing.assert_array_equal(getattr(got, key), want[key][part])
        for layer in layers:
            np.testing.assert_allclose(got.hidden[layer], want[f"hidden{layer}"][part], rtol=1e-5, atol=1e-5)
        start += length
    assert verify_cache(GOLDEN / name).findings == []


@pytest.mark.parametrize("name", ["v1-sketch", "v1-predicted"])
def test_tail_logits_of_golden_sketches(name):
    want, cache = expected(name), LogitCache(GOLDEN / name)
    names = ("head_ids", "head_logprobs", "tail_curve", "coordinates")
    targets = TargetArrays(*(want[n][:6] for n in names))
    got = tail_logits(cache.bases[0], cache.spec.curve, targets)
    np.testing.assert_allclose(got, want["tail_logits"], rtol=1e-5, atol=1e-5)
    free = targets.coordinates @ cache.bases[0].components.T + cache.bases[0].mean
    assert (got < free - 1e-3).any() == (name == "v1-predicted")


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_made_from_the_page_agrees(name):
    want, got = expected(name), independent(name)
    for mine, theirs in EXACT.items():
        np.testing.assert_array_equal(got[mine], want[theirs])
    for mine, theirs in CLOSE.items():
        np.testing.assert_allclose(got[mine], want[theirs], rtol=1e-5, atol=1e-5)
    if "tail_logits" in want:
        on = want["loss_mask"][:6]
        np.testing.assert_allclose(got["t"][:6][on], want["tail_logits"][on], rtol=1e-4, atol=1e-4)
    for key in (k for k in want if k.startswith("hidden")):
        np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=1e-4)


def test_a_reader_made_from_the_page_agrees_on_smaller_heads():
    reader = independent_reader.Cache(GOLDEN / "v1-sketch")
    cache = LogitCache(GOLDEN / "v1-sketch", k=2)
    for number, row in reader.rows.items():
        logprobs, curve = independent_reader.smaller_head(row, reader.target["curve_nodes"], 2)
        got, on = cache.sequence(number), row["msk"]
        np.testing.assert_allclose(got.targets.head_logprobs[on], logprobs[on], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.targets.tail_curve[on], curve[on], rtol=1e-4, atol=1e-4)


def test_a_smaller_rank_of_predicted_coordinates_is_a_prefix():
    want, cache = expected("v1-predicted"), LogitCache(GOLDEN / "v1-predicted", k=2, rank=7)
    assert cache.bases[0].rank == 7
    start = 0
    for number, length in enumerate(want["lengths"].tolist()):
        got = cache.sequence(number).targets.coordinates
        np.testing.assert_allclose(got, want["coordinates"][start : start + length, :7], rtol=1e-6)
        start += length


@pytest.mark.parametrize("name", NAMES)
def test_both_refuse_the_same_damage(name, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / "c")
    rng = np.random.default_rng(0)
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != "tokenizer"]
    for path in files:
        data = path.read_bytes()
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises((independent_reader.Refused, ValueError, KeyError)):
            independent_reader.Cache(folder)
        with pytest.raises(CacheError):
            LogitCache(folder, verify_hashes="eager")
        path.write_bytes(data)


def test_the_page_names_every_key_and_column():
    page = (Path(__file__).parents[2] / "schemas/FORMAT.md").read_text()
    for name in NAMES:
        cache = LogitCache(GOLDEN / name)
        keys = set(json.loads((GOLDEN / name / "dataset.json").read_bytes()))
        keys |= set(json.loads((GOLDEN / name / "commits/00000.json").read_bytes()))
        keys |= set(cache.spec.to_json())
        keys |= set(cache.dataset.hidden.to_json() if cache.dataset.hidden else ())
        keys |= set(safetensors.numpy.load(read_basis(name))) if cache.bases else set()
        keys |= {n for n in cache.shards[0].codec.schema.names if not n.startswith("sk")}
        assert [key for key in sorted(keys) if f"`{key}`" not in page] == []


def test_golden_caches_are_small():
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 100_000


def after(page, text):
    """The code block after a text: its lines."""
    block = page.split(text)[1].split("\n\n")[1]
    return [" ".join(line.split()) for line in block.splitlines()]


def test_the_page_gives_the_slope_at_zero():
    page = (Path(__file__).parents[2] / "schemas/FORMAT.md").read_text()
    weights, _ = after(page, "linear function of log(V - k) and the curve's values:")
    assert weights.startswith("w[j] = prod_{i != j} (b_i / (b_i - b_j)) / b_j")
    curve = LogitCache(GOLDEN / "v1-sketch").spec.curve
    b = np.array(curve.nodes)
    w = [np.prod([c / (c - b[j]) for i, c in enumerate(b) if i != j]) / b[j] for j in range(len(b))]
    values = np.linspace(9.0, 2.0, len(b))
    np.testing.assert_allclose(np.dot(w, values - curve.at_zero), curve.slope(values), rtol=1e-9)


def test_the_page_names_what_is_measured():
    page = (Path(__file__).parents[2] / "schemas/FORMAT.md").read_text()
    names = {name.partition("@")[0] for name in Calibration.measured(SimpleNamespace(error={1.0: ERROR}))}
    names |= {"refitted", *json.loads((GOLDEN / "v1-sketch/commits/00000.json").read_bytes())["measured"]}
    assert [name for name in sorted(names) if f"`{name}`" not in page and f"`{name}@T`" not in page] == []
    text = page.split("`measured` MAY")[1].split("A cache is complete")[0]
    assert STRETCH_TOKENS == 2**19
    assert "2^19 tokens" in text
    assert f"at most {HELD_BACK_TOKENS} rows of the whole" in text.replace("\n", " ")
    assert f"at most {JUDGED_HELD_BACK_TOKENS} rows of it" in text.replace("\n", " ")


@pytest.mark.parametrize("name", ["v1-sketch", "v1-predicted"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_float32_is_off_by_no_more_than_the_page_says(name, temperature):
    cache = LogitCache(GOLDEN / name)
    bases = [TailBasis.from_sketch(basis) for basis in cache.bases]
    for number in cache.numbers.tolist():
        row = cache.sequence(number)
        tail = tail_logits(cache.bases[row.basis_index], cache.spec.curve, row.targets)
        exact = reconstruct_logprobs(
            row.targets, cache.spec, temperature=temperature, basis=cache.bases[row.basis_index], tail=tail
        )
        index = np.full(len(row), row.basis_index)
        target = TeacherTarget.from_arrays(row.targets, cache.spec, bases=bases, basis_index=index)
        error = np.abs(np.array(target.at(temperature).rows()) - exact).max(axis=1)[row.loss_mask]
        assert (error <= 2**-22 * np.abs(tail).max(axis=1)[row.loss_mask]).all()

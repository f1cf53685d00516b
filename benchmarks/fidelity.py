"""Fidelity of every kind of target against the bytes it takes, on real text and with an honest split.

The figure is the relative error (Frobenius, over all evaluation tokens) of the LM-head gradient of forward
KL, || sum_n s_n (p^_n - p_n)' || / || sum_n s_n (q_n - p_n)' ||, s and q the hidden states and distribution
of a student (the teacher without a fifth of its layers), p the teacher, p^ the target as read from a shard.
It is taken along 128 random directions of s: the same ones above and below. Bytes are those of the files
that the cache writer makes, input ids included, sidecars apart. Calibration, refit and evaluation use
different documents. About 10 minutes on two cores.

    python benchmarks/fidelity.py [--teacher M] [--tokens 6144] [--json FILE] [--quick]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np

from pipeline.demo import demo_teacher
from pipeline.demo_text import demo_documents
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.calibrate import Calibration, DriftMonitor, Sample, as_stored, calibrate
from pmetal_distill.offline.capture import as_numpy, capture
from pmetal_distill.offline.rebuild import head_logprobs, reconstruct_logprobs
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence
from pmetal_distill.students import init_student
from schemas.arrays import TargetArrays
from schemas.basis import NO_CEILING, plan_groups
from schemas.codebook import Codebook
from schemas.codec import Codec
from schemas.manifest import FINGERPRINT_PARTS, Dataset
from schemas.spec import TargetSpec
from schemas.tail import tail_logits

WINDOW, LONGEST_DOCUMENT, CHUNK, DIRECTIONS = 512, 2048, 128, 128
TEMPERATURES = (1.0, 2.0, 4.0)
SIZES = ((256, 80.0), (256, 60.0), (384, 45.0))


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Tokens of some documents, cut into windows, and what the models make of them."""

    windows: list[np.ndarray]
    states: np.ndarray
    student: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n]."""
        return np.concatenate(self.windows)


@dataclass(slots=True, eq=False)
class Row:
    """One line of the table, while it is being measured."""

    name: str
    codec: Codec
    calibration: Calibration | None
    wrong: dict[float, np.ndarray] = field(default_factory=dict)
    captured: list[TargetArrays] = field(default_factory=list)
    estimate: dict[float, np.ndarray] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def read(name: str, model: LoadedModel, *, seed: int) -> list[np.ndarray]:
    """Token ids of the documents of a text, in random order."""
    documents = [model.tokenizer.encode(d.text)[:LONGEST_DOCUMENT] for d in demo_documents(name)]
    order = np.random.default_rng(seed).permutation(len(documents))
    return [np.array(documents[i], np.int32) for i in order]


def take(documents: list[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Removes documents from the list until they hold `tokens` tokens."""
    taken: list[np.ndarray] = []
    while documents and sum(map(len, taken)) < tokens:
        taken.append(documents.pop())
    return taken


def run(documents: list[np.ndarray], teacher: LoadedModel, student: LoadedModel | None = None) -> Text:
    """Both models on windows of the documents."""
    windows = [d[a : a + WINDOW] for d in documents for a in range(0, len(d), WINDOW)]

    def states(model: LoadedModel) -> np.ndarray:
        return np.concatenate([as_numpy(model.hidden(mx.array(w[None])).final[0]) for w in windows])

    return Text(windows, states(teacher), states(student) if student else np.zeros(0, np.float32))


def sample(text: Text, teacher: LoadedModel, part: slice = slice(None)) -> Sample:
    """Rows to calibrate on."""
    return Sample(text.states[part], teacher.logits, CHUNK, text.token_ids[part])


def softmax(rows: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of rows of logits."""
    shifted = (rows - rows.max(axis=1, keepdims=True)) * np.float32(1 / temperature)
    np.exp(shifted, out=shifted)
    return shifted / shifted.sum(axis=1, keepdims=True)


def evaluate(rows: Sequence[Row], text: Text, teacher: LoadedModel, student: LoadedModel) -> list[Row]:
    """Fills in bytes and errors of all rows on one text."""
    rng = np.random.default_rng(7)
    directions = rng.standard_normal((text.student.shape[1], DIRECTIONS)).astype(np.float32)
    right = {t: np.zeros((DIRECTIONS, teacher.vocab_size), np.float32) for t in TEMPERATURES}
    meant = {t: np.zeros_like(right[t]) for t in TEMPERATURES}
    mean = {t: np.zeros(teacher.vocab_size) for t in TEMPERATURES}
    mean_state = np.zeros(DIRECTIONS)
    for row in rows:
        row.wrong = {t: np.zeros_like(right[t]) for t in TEMPERATURES}
        row.estimate = {t: np.zeros_like(right[t]) for t in TEMPERATURES}
    for start in range(0, len(text.states), CHUNK):
        part = slice(start, start + CHUNK)
        logits = as_numpy(teacher.logits(mx.array(text.states[part])))
        guess = as_numpy(student.logits(mx.array(text.student[part])))
        exact = {t: softmax(logits, t) for t in TEMPERATURES}
        guessed = {t: softmax(guess, t) for t in TEMPERATURES}
        along, ahead = (text.student[part] @ directions).T, (text.states[part] @ directions).T
        mean_state += ahead.sum(axis=1)
        for t in TEMPERATURES:
            right[t] += along @ (guessed[t] - exact[t])
            meant[t] += ahead @ exact[t]
            mean[t] += exact[t].sum(axis=0)
        for row in rows:
            stored = capture_row(row, logits, text.states[part], text.token_ids[part])
            for t, found in rebuilt(row.codec, stored, guessed):
                found -= exact[t]
                row.wrong[t] += along @ found
                row.estimate[t] += ahead @ found
    for row in rows:
        for t in TEMPERATURES:
            centred = meant[t] - np.outer(mean_state, mean[t] / len(text.states))
            row.result[f"gradient@{t:g}"] = float(np.linalg.norm(row.wrong[t]) / np.linalg.norm(right[t]))
            row.result[f"estimate@{t:g}"] = float(np.linalg.norm(row.estimate[t]) / np.linalg.norm(centred))
        row.result |= written_bytes(row, text)
        row.wrong, row.estimate, row.captured = {}, {}, []
    return list(rows)


def capture_row(row: Row, logits: np.ndarray, hidden: np.ndarray, token_ids: np.ndarray) -> TargetArrays:
    """Captures a chunk for one row of the table; what a reader will get of it."""
    made = row.calibration.map if row.calibration else None
    captured = capture(logits, row.codec.spec, hidden=hidden, sketch=made)
    row.captured.append(captured)
    return as_stored(captured, row.codec, token_ids)


def rebuilt(
    codec: Codec, stored: TargetArrays, guessed: dict[float, np.ndarray]
) -> Iterator[tuple[float, np.ndarray]]:
    """Probabilities at every temperature. In a bucket, the student's own tail keeps its shape."""
    tail = tail_logits(codec.basis, codec.spec.curve, stored) if codec.basis else None
    for t in TEMPERATURES:
        if codec.spec.tail == "bucket":
            head, mass = head_logprobs(stored, codec.spec, temperature=t)
            found = guessed[t].copy()
            np.put_along_axis(found, stored.head_ids, 0, axis=1)
            found *= (np.exp(mass) / found.sum(axis=1, dtype=np.float64)).astype(np.float32)[:, None]
            np.put_along_axis(found, stored.head_ids, np.exp(head).astype(np.float32), axis=1)
        else:
            found = np.exp(
                reconstruct_logprobs(stored, codec.spec, temperature=t, basis=codec.basis, tail=tail)
            )
        yield t, found


def written_bytes(row: Row, text: Text) -> dict[str, float]:
    """Bytes a token of the shards that the cache writer makes, and of the sidecars."""
    windows, codec = text.windows, row.codec
    targets = TargetArrays.concatenate(row.captured)
    fingerprint = dict.fromkeys(FINGERPRINT_PARTS, "benchmark")
    tokens = sum(map(len, windows))
    dataset = Dataset(fingerprint, codec.spec, len(windows), tokens, len(windows), WINDOW, 4096, None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        with CacheWriter.create_or_resume(folder, dataset, {"tokenizer.json": b"{}"}) as writer:
            record = writer.write_shard(
                0, sequences(windows, targets), basis=codec.basis, codebook=codec.codebook
            )
        sidecars = sum(path.stat().st_size for path in (folder / "bases").iterdir())
    return {"bytes": record.targets.num_bytes / tokens, "sidecar_mb": sidecars / 1e6}


def sequences(windows: list[np.ndarray], targets: TargetArrays) -> Iterator[CapturedSequence]:
    """One sequence a window, every position trained."""
    start = 0
    for window in windows:
        n = len(window)
        yield CapturedSequence(
            window, np.zeros(n, np.int32), np.ones(n, np.bool_), targets[start : start + n]
        )
        start += n


def plain_row(name: str, spec: TargetSpec, text: Text, teacher: LoadedModel) -> Row:
    """A row without a sketch."""
    captured = sample(text, teacher).thinned(4096).captured(spec, None)
    return Row(name, Codec(spec, None, Codebook.fit(captured, spec)), None)


def sketch_row(name: str, calibration: Calibration) -> Row:
    """A row of a calibration."""
    return Row(name, Codec(calibration.spec, calibration.basis, calibration.codebook), calibration)


def without(row: Row, what: str) -> Row:
    """The same row with a part of the sketch left out."""
    basis, calibration = row.codec.basis, row.calibration
    assert basis is not None
    assert calibration is not None
    if what == "ceiling":
        changed = replace(basis, margin=NO_CEILING)
    else:
        plain = basis.with_predictor(None)
        changed = plain.with_groups(plan_groups(calibration.fitted.spread, basis.step))
    codec = Codec(calibration.spec, changed, calibration.codebook)
    return Row(f"{row.name}, no {what}", codec, replace(calibration, basis=changed))


def fit(
    text: Sample, held: Sample, teacher: LoadedModel, rank: int, step: float, *, k: int = 16
) -> Calibration:
    """A calibration of one size."""
    spec = TargetSpec(teacher.vocab_size, k=k)
    return calibrate(text, held, spec, rank=rank, step=step, head=teacher.head)


def joined(first: Sample, second: Sample) -> Sample:
    """The rows of both."""
    return replace(
        first,
        states=np.concatenate([first.states, second.states]),
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
    )


def show(rows: Sequence[Row], title: str) -> None:
    """Prints a table."""
    print(f"\n{title}\n{'target':40s} {'B/token':>8s}   gradient error at T = 1 / 2 / 4     estimate")
    for row in rows:
        r = row.result
        errors = " / ".join(f"{r[f'gradient@{t:g}']:.4f}" for t in TEMPERATURES)
        guess = " / ".join(f"{r[f'estimate@{t:g}']:.3f}" for t in TEMPERATURES) if row.calibration else ""
        print(f"{row.name:40s} {r['bytes']:8.1f}   {errors:32s} {guess}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--tokens", type=int, default=6144, help="evaluation tokens a text, at least")
    parser.add_argument("--json", default=None)
    parser.add_argument("--quick", action="store_true", help="one size, documentation only")
    args = parser.parse_args()
    started = time.perf_counter()
    teacher = load_model(args.teacher or demo_teacher())
    with tempfile.TemporaryDirectory() as scratch:
        cut = round(teacher.num_layers * 2 / 3)
        keep = [i for i in range(teacher.num_layers) if not cut <= i < cut + teacher.num_layers // 5]
        student = load_model(init_student(teacher, keep_layers=keep, out=Path(scratch) / "student"))
        tables = {}
        for title, rows in measure(teacher, student, args):
            tables[title] = rows
            show(rows, title)
    seconds = time.perf_counter() - started
    sidecars = max(row.result["sidecar_mb"] for rows in tables.values() for row in rows)
    print(f"\n{seconds:.0f} s; sidecars {sidecars:.0f} MB at most")
    if args.json:
        found = {title: [{"name": r.name, **r.result} for r in rows] for title, rows in tables.items()}
        Path(args.json).write_text(json.dumps({"seconds": seconds, "tables": found}, indent=2))


def measure(
    teacher: LoadedModel, student: LoadedModel, args: argparse.Namespace
) -> Iterator[tuple[str, list[Row]]]:
    """All tables, one after another."""
    n, vocab_size = args.tokens, teacher.vocab_size
    documents = read("python-docs", teacher, seed=1)
    docs_eval, docs_held, docs_fit = (
        run(take(documents, size), teacher, student if i == 0 else None)
        for i, size in enumerate((n, 1024, 2 * n))
    )
    fit_docs, held_docs = sample(docs_fit, teacher), sample(docs_held, teacher)
    sizes = SIZES[1:2] if args.quick else SIZES
    calibrations = [fit(fit_docs, held_docs, teacher, *size) for size in sizes]
    sketches = [
        sketch_row(f"top-16 + sketch r={rank}, step {step:g}", c)
        for (rank, step), c in zip(sizes, calibrations, strict=True)
    ]
    plain = [
        plain_row(f"top-{k} {label}", TargetSpec(vocab_size, k=k, tail=tail), docs_fit, teacher)
        for k, tail, label in (
            (64, "none", "renormalised"),
            (64, "bucket", "+ bucket"),
            (16, "bucket", "+ bucket"),
        )
    ]
    middle = sketches[len(sketches) // 2]
    parts = [without(middle, "ceiling"), without(middle, "predictor")]
    yield "Python documentation", evaluate([*plain, *sketches, *parts], docs_eval, teacher, student)
    if args.quick:
        return
    documents = read("licences", teacher, seed=1)
    other_eval, other_held, other_fit = (
        run(take(documents, size), teacher, student if i == 0 else None)
        for i, size in enumerate((n * 3 // 4, 1024, n))
    )
    fit_other, held_other = sample(other_fit, teacher), sample(other_held, teacher)
    half = sample(docs_fit, teacher, slice(0, n))
    mixed = [
        fit(joined(half, fit_other), joined(held_docs, held_other), teacher, *size) for size in SIZES[1:]
    ]
    named = [f"mixed: sketch r={rank}, step {step:g}" for rank, step in SIZES[1:]]
    unseen = calibrations[1]
    monitor = DriftMonitor(unseen, teacher.head)
    refit = monitor.choose(fit_other.thinned(2048), held_other)
    noticed = "noticed, refitted" if refit.basis is not unseen.basis else "not noticed"
    rows = [plain_row(r.name, r.codec.spec, docs_fit, teacher) for r in plain]
    rows += [sketch_row(name, c) for name, c in zip(named, mixed, strict=True)]
    rows += [sketch_row("unseen: no refit", unseen), sketch_row(f"unseen: {noticed}", refit)]
    yield "Licences", evaluate(rows, other_eval, teacher, student)
    rows = [sketch_row(name, c) for name, c in zip(named, mixed, strict=True)]
    yield "Python documentation, mixed data", evaluate(rows, docs_eval, teacher, student)


if __name__ == "__main__":
    main()

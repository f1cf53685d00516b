"""Fidelity of every kind of target against the bytes it takes, on real text and with an honest split.

The figure is the relative error of the LM-head gradient of forward KL as in gradients.py, of a student that
is the teacher without a fifth of its layers, with targets as read from a shard. Bytes are those of the files
that the cache writer makes, input ids included, sidecars apart. Calibration, refit and evaluation use
different documents. About 10 minutes on two cores.

    python benchmarks/fidelity.py [--teacher M] [--tokens 6144] [--json FILE] [--quick]
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.gradients import CHUNK, TEMPERATURES, Chunk, Text, bucketed, measure_errors
from pipeline.demo import demo_teacher
from pipeline.demo_text import demo_documents
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.calibrate import Calibration, DriftMonitor, as_stored, calibrate
from pmetal_distill.offline.capture import as_numpy, capture
from pmetal_distill.offline.rebuild import head_logprobs, reconstruct_logprobs
from pmetal_distill.offline.sample import Sample
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence
from pmetal_distill.students import init_student
from schemas.arrays import TargetArrays
from schemas.basis import NO_CEILING, plan_groups
from schemas.codebook import Codebook
from schemas.codec import Codec
from schemas.manifest import FINGERPRINT_PARTS, Dataset
from schemas.spec import TargetSpec
from schemas.tail import tail_logits

WINDOW, LONGEST_DOCUMENT = 512, 2048
SIZES = ((256, 80.0), (256, 60.0), (384, 45.0))
WITHOUT_SKETCH = ((64, "none", "renormalised"), (64, "bucket", "+ bucket"), (16, "bucket", "+ bucket"))


@dataclass(slots=True, eq=False)
class Row:
    """One line of the table, while it is being measured."""

    name: str
    codec: Codec
    calibration: Calibration | None
    captured: list[TargetArrays] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def rebuilt(self, chunk: Chunk) -> Iterator[tuple[float, np.ndarray]]:
        """Captures a chunk; what a reader will make of it."""
        self.captured.append(self.capture(chunk.logits, chunk.states))
        stored = as_stored(self.captured[-1], self.codec, chunk.token_ids)
        return rebuilt(self.codec, stored, chunk.guessed)

    def capture(self, logits: np.ndarray, states: np.ndarray) -> TargetArrays:
        """Targets of rows of logits."""
        made = self.calibration.map if self.calibration else None
        return capture(logits, self.codec.spec, hidden=states, sketch=made)


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


def texts(name: str, sizes: Sequence[int], teacher: LoadedModel, student: LoadedModel) -> list[Text]:
    """Texts of so many tokens, of different documents; both models run on the first of them only."""
    documents = read(name, teacher, seed=1)
    return [run(take(documents, size), teacher, student if i == 0 else None) for i, size in enumerate(sizes)]


def sample(text: Text, teacher: LoadedModel, part: slice = slice(None)) -> Sample:
    """Rows to calibrate on."""
    return Sample(text.states[part], teacher.logits, CHUNK, text.token_ids[part])


def evaluate(rows: Sequence[Row], text: Text, teacher: LoadedModel, student: LoadedModel) -> list[Row]:
    """Fills in bytes and errors of all rows on one text."""
    measure_errors(rows, text, teacher, student)
    for row in rows:
        row.result |= written_bytes(row, text)
        row.captured = []
    return list(rows)


def rebuilt(
    codec: Codec, stored: TargetArrays, guessed: dict[float, np.ndarray]
) -> Iterator[tuple[float, np.ndarray]]:
    """Probabilities at every temperature. In a bucket, the student's own tail keeps its shape."""
    tail = tail_logits(codec.basis, codec.spec.curve, stored) if codec.basis else None
    for t in TEMPERATURES:
        if codec.spec.tail == "bucket":
            head, mass = head_logprobs(stored, codec.spec, temperature=t)
            found = bucketed(stored.head_ids, np.exp(head), np.exp(mass), guessed[t])
        else:
            found = np.exp(
                reconstruct_logprobs(stored, codec.spec, temperature=t, basis=codec.basis, tail=tail)
            )
        yield t, found


def written_bytes(row: Row, text: Text) -> dict[str, float]:
    """Bytes a token of the shards that the cache writer makes, and of the sidecars."""
    tokens = sum(map(len, text.windows))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "cache"
        shard = write_cache(folder, row.codec, text.windows, TargetArrays.concatenate(row.captured))
        sidecars = sum(path.stat().st_size for path in (folder / "bases").iterdir())
    return {"bytes": shard / tokens, "sidecar_mb": sidecars / 1e6}


def write_cache(folder: Path, codec: Codec, windows: list[np.ndarray], targets: TargetArrays) -> int:
    """A cache of one shard; its bytes."""
    fingerprint = dict.fromkeys(FINGERPRINT_PARTS, "benchmark")
    tokens = sum(map(len, windows))
    dataset = Dataset(fingerprint, codec.spec, len(windows), tokens, len(windows), WINDOW, 4096, None)
    with CacheWriter.create_or_resume(folder, dataset, {"tokenizer.json": b"{}"}) as writer:
        record = writer.write_shard(
            0, sequences(windows, targets), basis=codec.basis, codebook=codec.codebook
        )
    return record.targets.num_bytes


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
        student = short_student(teacher, Path(scratch) / "student")
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


def short_student(teacher: LoadedModel, folder: Path) -> LoadedModel:
    """The teacher without a fifth of its layers."""
    cut = round(teacher.num_layers * 2 / 3)
    keep = [i for i in range(teacher.num_layers) if not cut <= i < cut + teacher.num_layers // 5]
    return load_model(init_student(teacher, keep_layers=keep, out=folder))


def measure(
    teacher: LoadedModel, student: LoadedModel, args: argparse.Namespace
) -> Iterator[tuple[str, list[Row]]]:
    """All tables, one after another."""
    n = args.tokens
    docs_eval, docs_held, docs_fit = texts("python-docs", (n, 1024, 2 * n), teacher, student)
    fit_docs, held_docs = sample(docs_fit, teacher), sample(docs_held, teacher)
    sizes = SIZES[1:2] if args.quick else SIZES
    calibrations = [fit(fit_docs, held_docs, teacher, *size) for size in sizes]
    sketches = [
        sketch_row(f"top-16 + sketch r={rank}, step {step:g}", c)
        for (rank, step), c in zip(sizes, calibrations, strict=True)
    ]
    plain = [
        plain_row(f"top-{k} {label}", TargetSpec(teacher.vocab_size, k=k, tail=tail), docs_fit, teacher)
        for k, tail, label in WITHOUT_SKETCH
    ]
    middle = sketches[len(sketches) // 2]
    parts = [without(middle, "ceiling"), without(middle, "predictor")]
    yield "Python documentation", evaluate([*plain, *sketches, *parts], docs_eval, teacher, student)
    if args.quick:
        return
    other_eval, other_held, other_fit = texts("licences", (n * 3 // 4, 1024, n), teacher, student)
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

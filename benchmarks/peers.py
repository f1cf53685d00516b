"""Our cache beside other ways to keep a teacher: bytes, error of the gradient, speed, on the same logits.

    python benchmarks/peers.py [--tokens 6144] [--distillkit CHECKOUT] [--only NAME] [--json FILE]
    python benchmarks/figures.py --peers FILE

Bytes are those of the files written, over the tokens of the text; sidecars apart. The error is that of
gradients.py, as in fidelity.py; calibration and evaluation use different documents. Encoding takes logits in
memory to closed files, decoding files to arrays of ids and log-probabilities (of ours: also the tail's), in
tokens per second of CPU time of all threads, the best of `--repeats`, opening and calibration apart. Peers
that are not installed (benchmarks/requirements-peers.txt) are named and left out. 10 minutes on two cores.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks import fidelity
from benchmarks.gradients import TEMPERATURES, Chunk, Text, measure_errors
from benchmarks.peer_formats import (
    Dense,
    Format,
    JsonLines,
    Reading,
    Said,
    both_renormalised,
    everything,
    mass_at_one,
    one_event,
    renormalised,
    uniform,
)
from benchmarks.peer_packages import CHUNK, DistillKit, Dwq, Gmlx, MlxKld
from benchmarks.peer_sampling import PackedSampled, Sampled
from pipeline.demo import demo_teacher
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.capture import as_numpy
from pmetal_distill.offline.reader import LogitCache
from schemas.arrays import TargetArrays
from schemas.spec import TargetSpec

SIZES = ((128, 100.0), (256, 60.0), (384, 45.0))
DISTILLKIT: dict[str, dict[str, Any]] = {
    "recommended, top 128": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "recommended + normalize_t": {
        "k": 128,
        "exact_k": 16,
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "normalize_t": True,
    },
    "budget, top 50": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "budget + 6-bit residuals": {
        "k": 50,
        "exact_k": 1,
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 6, "num_elements": 49}],
    },
}
COMMON = {"exact_dtype": "bfloat16", "delta_encoding": False, "residual_bins": []}
PACKAGES = ("mlx", "mlx-lm", "numpy", "pyarrow", "safetensors", "gmlx", "mlx-kld", "torch")


@dataclass(slots=True, eq=False)
class Ours:
    """A cache of this project, written by its writer and read by its reader."""

    row: fidelity.Row

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"ours, {self.row.name}"

    def write(self, folder: Path, said: Said) -> None:
        parts = [self.row.capture(said.logits[part], said.states[part]) for part in said.parts()]
        fidelity.write_cache(folder / "cache", self.row.codec, said.windows, TargetArrays.concatenate(parts))

    def open(self, folder: Path, said: Said) -> Callable[[], TargetArrays]:
        options = {"batch_size": len(said.windows), "seed": 0, "shuffle": False, "prefetch": 0}
        cache = LogitCache(folder / "cache")

        def read() -> TargetArrays:
            with cache.batches(epochs=1, **options) as batches:
                batch = next(batches)
            return batch.targets[batch.documents >= 0]

        return read


@dataclass(slots=True, eq=False)
class Row:
    """A line of the table: what was read of a format, and how a loss takes it.

    Attributes:
        reading: None for our own targets, which fidelity.py rebuilds.
        temperatures: those the format can be read at.
    """

    name: str
    format: Format
    stored: Any
    reading: Reading | None
    temperatures: Sequence[float]
    result: dict[str, Any] = field(default_factory=dict)

    def rebuilt(self, chunk: Chunk) -> Iterator[tuple[float, np.ndarray]]:
        """Probabilities of a chunk's tokens."""
        part = self.stored[chunk.part]
        if self.reading is None:
            yield from fidelity.rebuilt(self.format.row.codec, part, chunk.guessed)
            return
        for t in self.temperatures:
            yield t, self.reading(part, t, chunk.guessed[t])


def peers() -> list[tuple[Format, str, list[tuple[str, Reading, Sequence[float]]]]]:
    """Formats of others, the module each needs, and how each is read."""
    zero, bucket = ("renormalised", renormalised), ("+ bucket", one_event)
    all_of_them = {
        "": [
            (Dense(), [("", everything)]),
            *[(JsonLines(20, packed), [zero, bucket]) for packed in (False, True)],
        ],
        "mlx_lm.quant.dwq": [(Dwq(), [("as a target", renormalised), ("in its loss", both_renormalised)])],
        "gmlx.distill.cache": [(Gmlx(k), [("", mass_at_one)]) for k in (64, 256)],
        "mlx_kld.cache": [(MlxKld(), [("uniform tail", uniform)])],
        "distillkit.compression.compressor": [
            (DistillKit(label, COMMON | config), [zero, bucket]) for label, config in DISTILLKIT.items()
        ],
    }
    found = [
        (made, module, [(label, reading, TEMPERATURES) for label, reading in readings])
        for module, formats in all_of_them.items()
        for made, readings in formats
    ]
    for kind in (Sampled, PackedSampled):
        for t in TEMPERATURES:
            drawn = kind(50, t)
            found.append((drawn, "", [("", drawn.shares, (t,))]))
    found += [
        (drawn, "", [("", drawn.shares, (1.0,))]) for drawn in map(PackedSampled, (100, 150), (1.0, 1.0))
    ]
    drawn = Sampled(50, 1.0, with_logprobs=True)
    found.append((drawn, "", [("", drawn.weighted, TEMPERATURES)]))
    return found


def importable(module: str) -> bool:
    """Whether a peer is there; says so if not."""
    try:
        importlib.import_module(module or "numpy")
    except ImportError as error:
        print(f"left out: {module} ({error})", file=sys.stderr)
        return False
    return True


def measure(made: Format, said: Said, repeats: int) -> tuple[Any, dict[str, float]]:
    """Writes and reads a format: what was read, its bytes a token and its speeds."""
    writing, reading = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(repeats):
            shutil.rmtree(folder)
            folder.mkdir()
            start = time.process_time()
            made.write(folder, said)
            writing.append(time.process_time() - start)
        read = made.open(folder, said)
        for _ in range(repeats + 1):
            start = time.process_time()
            stored = read()
            reading.append(time.process_time() - start)
        size = sum(file.stat().st_size for file in kept(folder))
    n = len(said.logits)
    return stored, {"bytes": size / n, "encode": n / min(writing), "decode": n / min(reading)}


def kept(folder: Path) -> list[Path]:
    """The files that grow with the text: of our cache the shards, of the others all but sidecars."""
    shards = folder / "cache" / "shards"
    files = (shards if shards.is_dir() else folder).rglob("*")
    return [file for file in files if file.is_file() and not file.name.startswith("sidecar")]


def all_rows(ours: Sequence[Ours], said: Said, repeats: int, only: Sequence[str] = ()) -> list[Row]:
    """Every format written, read and timed; of others those whose names contain one of `only`, if given."""
    rows = []
    for one in ours:
        stored, result = measure(one, said, repeats)
        rows.append(Row(one.name, one, stored, None, TEMPERATURES, result))
        print(f"{one.name}: {result}", file=sys.stderr, flush=True)
    for made, module, readings in peers():
        if only and not any(part in made.name for part in only):
            continue
        if not importable(module):
            continue
        stored, result = measure(made, said, repeats)
        print(f"{made.name}: {result}", file=sys.stderr, flush=True)
        for label, reading, temperatures in readings:
            name = f"{made.name} {label}".strip()
            rows.append(Row(name, made, stored, reading, temperatures, dict(result)))
    return rows


def our_formats(fit_on: Text, held: Text, teacher: LoadedModel) -> list[Ours]:
    """Three sizes of the sketch, and the heads that others keep."""
    samples = fidelity.sample(fit_on, teacher), fidelity.sample(held, teacher)
    rows = []
    for rank, step in SIZES:
        start = time.process_time()
        calibration = fidelity.fit(*samples, teacher, rank, step)
        spent = time.process_time() - start
        print(f"calibration r={rank}: {spent:.1f} CPU-s once a data set", file=sys.stderr)
        rows.append(fidelity.sketch_row(f"top-16 + sketch r={rank}, step {step:g}", calibration))
    for tail, label in (("bucket", "+ bucket"), ("none", "renormalised")):
        spec = TargetSpec(teacher.vocab_size, k=64, tail=tail)
        rows.append(fidelity.plain_row(f"top-64 {label}", spec, fit_on, teacher))
    return [Ours(row) for row in rows]


def whole(documents: list[np.ndarray], multiple: int) -> list[np.ndarray]:
    """The documents less some tokens of the last ones, so that their number is a multiple."""
    excess = sum(map(len, documents)) % multiple
    while excess:
        last = documents.pop()
        rest = last[: max(0, len(last) - excess)]
        excess -= len(last) - len(rest)
        documents += [rest] if len(rest) else []
    return documents


def run(teacher: LoadedModel, student: LoadedModel, args: argparse.Namespace) -> list[Row]:
    """Texts, calibration, all formats, errors."""
    documents = fidelity.read("python-docs", teacher, seed=1)
    cut = whole(fidelity.take(documents, args.tokens), CHUNK)
    text = fidelity.run(cut, teacher, student)
    held = fidelity.run(fidelity.take(documents, 1024), teacher)
    fit_on = fidelity.run(fidelity.take(documents, 2 * args.tokens), teacher)
    logits = [
        as_numpy(teacher.logits(mx.array(text.states[a : a + 512]))) for a in range(0, len(text.states), 512)
    ]
    texts = [teacher.tokenizer.decode(window.tolist()) for window in text.windows]
    said = Said(text.windows, np.concatenate(logits), text.states, texts)
    ours = our_formats(fit_on, held, teacher) if not args.only or "ours" in args.only else []
    rows = all_rows(ours, said, args.repeats, args.only)
    measure_errors(rows, text, teacher, student)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Prints the table, smallest first."""
    print(
        f"{'':52s} {'B/token':>9s}  {'error, T = 1 / 2 / 4':26s} {'encode':>8s} {'decode':>9s} tokens/CPU-s"
    )
    for row in sorted(rows, key=lambda row: row.result["bytes"]):
        r = row.result
        errors = " / ".join(
            f"{r[f'gradient@{t:g}']:.4f}" if t in row.temperatures else "-" for t in TEMPERATURES
        )
        print(f"{row.name:52s} {r['bytes']:9,.1f}  {errors:26s} {r['encode']:8,.0f} {r['decode']:9,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6144, help="evaluation tokens, about")
    parser.add_argument("--repeats", type=int, default=2, help="of writing and reading; the best counts")
    parser.add_argument("--distillkit", type=Path, help="a checkout of DistillKit, which no registry serves")
    parser.add_argument(
        "--only", action="append", default=[], help="part of the name of a rival, or 'ours'; repeatable"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sys.path += [str(args.distillkit)] if args.distillkit else []
    teacher = load_model(demo_teacher())
    with tempfile.TemporaryDirectory() as scratch:
        student = fidelity.short_student(teacher, Path(scratch) / "student")
        rows = run(teacher, student, args)
    show(rows)
    found = {name: version(name) for name in PACKAGES}
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    if args.json:
        kept_rows = [{"name": row.name, "temperatures": list(row.temperatures), **row.result} for row in rows]
        args.json.write_text(json.dumps({"versions": found, "rows": kept_rows}, indent=2))


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()

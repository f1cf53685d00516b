"""How cost grows: time and peak memory of both stages against V, k, rank, sequence length and batch.

    python benchmarks/growth.py [--rounds 3] [--json FILE]          about six minutes on two cores
    python benchmarks/figures.py --growth FILE

Random models; one size is varied at a time. Time is CPU time (other work on the machine does not count) a
token, with one BLAS thread, the least of some rounds that take turns: stage one without calibration, a
training step from the cache, and reading and decoding it without prefetching. Memory is the most that is held
beyond what was there before, by MLX's count plus Python's (NumPy). A slope is the fit of log cost against log
size; beside it stands the exponent of the leading term, or the two between which a sum of terms must lie.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim
import numpy as np

from benchmarks.letters import write_letters
from pipeline.cache import run_cache
from pipeline.calibration import Calibrator
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from tests.tiny import build_tiny_model

TOKENS, CALIBRATION, SLACK = 2048, 1024, 0.1
QUANTITIES = {
    "cache": "stage one, time a token",
    "cache_mb": "stage one, memory",
    "step": "training step, time a token",
    "step_mb": "training step, memory",
    "read": "reading, time a token",
}


@dataclass(frozen=True, slots=True)
class Size:
    """Of a teacher of one layer, a student, and their batches."""

    vocab: int = 16384
    k: int = 16
    rank: int = 64
    length: int = 128
    batch: int = 4
    width: int = 256


AXES: dict[str, tuple[int, ...]] = {
    "vocab": (4096, 8192, 16384, 32768),
    "k": (8, 16, 32, 64),
    "rank": (32, 64, 128, 256),
    "length": (64, 128, 256, 512),
    "batch": (2, 4, 8, 16),
}
# With V grow the head and its capture, not the body. Step memory holds a chunk of logits, at most 64 MiB.
EXPECTED: dict[str, dict[str, tuple[float, float]]] = {
    "vocab": {"cache": (0, 1), "cache_mb": (0, 1), "step": (0, 1), "step_mb": (0, 1), "read": (0, 0)},
    "k": {"cache": (0, 1), "cache_mb": (0, 0), "step": (0, 0), "step_mb": (0, 0), "read": (0, 1)},
    "rank": {"cache": (0, 1), "cache_mb": (0, 1), "step": (0, 1), "step_mb": (0, 1), "read": (0, 1)},
    "length": {"cache": (0, 1), "cache_mb": (0, 1), "step": (0, 1), "step_mb": (0, 1), "read": (0, 0)},
    "batch": {"cache": (0, 0), "cache_mb": (0, 1), "step": (0, 0), "step_mb": (0, 1), "read": (0, 0)},
}


class Point:
    """One size: its models and text in a folder, made once."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        common = {"vocab_size": size.vocab, "tokenizer_size": 320, "max_position_embeddings": 1024}
        build_tiny_model(folder / "teacher", hidden_size=size.width, num_layers=1, seed=1, **common)
        build_tiny_model(folder / "student", hidden_size=64, num_layers=1, **common)
        write_letters(folder / "text.jsonl", documents=TOKENS // 32, characters=31)
        self.teacher = load_model(folder / "teacher")
        self.batches: list[Any] = []

    def settings(self) -> CacheSettings:
        """Of stage one, into a folder of its own."""
        out = Path(tempfile.mkdtemp(dir=self.folder)) / "cache"
        return CacheSettings(
            teacher=str(self.folder / "teacher"),
            data=str(self.folder / "text.jsonl"),
            out=out,
            top_k=self.size.k,
            sketch_rank=self.size.rank,
            max_seq_len=self.size.length,
            batch_size=self.size.batch,
            calibration_tokens=CALIBRATION,
        )

    def cached(self) -> tuple[float, Path]:
        """CPU seconds a token of stage one without its calibration, and the cache."""
        settings, spent = self.settings(), []
        learn = Calibrator.learn

        def timed(calibrator: Calibrator) -> Any:
            start = time.process_time()
            found = learn(calibrator)
            spent.append(time.process_time() - start)
            return found

        with mock.patch.object(Calibrator, "learn", timed):
            start = time.process_time()
            summary = run_cache(settings, Console(quiet=True), teacher=self.teacher)
            total = time.process_time() - start
        return (total - sum(spent)) / summary["tokens"], settings.out

    def read(self, cache: LogitCache) -> float:
        """CPU seconds a token of reading all of it."""
        start = time.process_time()
        with cache.batches(batch_size=self.size.batch, seed=0, epochs=1, prefetch=0) as batches:
            self.batches = list(batches)
        return (time.process_time() - start) / cache.num_tokens

    def step(self, distiller: Distiller) -> float:
        """CPU seconds a token of a step."""
        start = time.process_time()
        distiller.step(self.batches[0])
        mx.synchronize()
        return (time.process_time() - start) / self.batches[0].token_ids.size

    def measure(self, *, with_memory: bool) -> dict[str, float]:
        """One value of every quantity; memory is the same every time and slow to watch."""
        found: dict[str, float] = {}
        found["cache"], out = self.cached()
        cache = LogitCache(out)
        found["read"] = min(self.read(cache) for _ in range(3))
        distiller = new_distiller(cache, load_model(self.folder / "student"))
        self.step(distiller)
        found["step"] = min(self.step(distiller) for _ in range(3))
        if with_memory:
            found["step_mb"] = peak_mb(lambda: self.step(distiller))
            again = self.settings()
            found["cache_mb"] = peak_mb(lambda: run_cache(again, Console(quiet=True), teacher=self.teacher))
        cache.close()
        return found


def new_distiller(cache: LogitCache, student: LoadedModel) -> Distiller:
    """Soft and hard loss at T = 2 with AdamW."""
    return Distiller(cache, student, DistillConfig(), optimizer=optim.AdamW(learning_rate=1e-5))


def peak_mb(work: Callable[[], Any]) -> float:
    """The most that is held beyond what was there before."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    work()
    mx.synchronize()
    host = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (mx.get_peak_memory() - before + host) / 1e6


def sizes() -> Iterator[tuple[str, Size]]:
    """Every axis with its sizes."""
    for axis, values in AXES.items():
        for value in values:
            yield axis, replace(Size(), **{axis: value})


def measure(rounds: int) -> dict[Size, dict[str, float]]:
    """The least of every quantity over rounds."""
    found: dict[Size, dict[str, float]] = {}
    for turn in range(rounds):
        for size in dict.fromkeys(size for _, size in sizes()):
            with tempfile.TemporaryDirectory() as folder:
                values = Point(size, Path(folder)).measure(with_memory=turn == 0)
            before = found.get(size, values)
            found[size] = before | {name: min(value, before[name]) for name, value in values.items()}
            shown = ", ".join(f"{name} {value:.3g}" for name, value in found[size].items())
            print(f"{turn + 1}/{rounds} {size}: {shown}", file=sys.stderr, flush=True)
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Of log y against log x."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def curves(found: dict[Size, dict[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of every axis and quantity."""
    result: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for axis, size in sizes():
        for name in QUANTITIES:
            points = result.setdefault(axis, {}).setdefault(name, [])
            points.append((getattr(size, axis), found[size][name]))
    return result


def show(found: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Prints slopes, and the values at both ends."""
    print(f"{'':8s} {'':28s} {'from':>10s} {'to':>10s} {'slope':>7s}  expected")
    for axis, quantities in found.items():
        for name, points in quantities.items():
            low, high = EXPECTED[axis][name]
            expected = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            ends = [f"{p[1]:.4g} MB" if name.endswith("mb") else f"{1e6 * p[1]:.4g} us" for p in points]
            found_slope = slope(points)
            off = "" if low - SLACK <= found_slope <= high + SLACK else "  outside"
            row = f"{ends[0]:>10s} {ends[-1]:>10s} {found_slope:7.2f}  {expected}{off}"
            print(f"{axis:8s} {QUANTITIES[name]:28s} {row}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    found = curves(measure(args.rounds))
    show(found)
    print(f"base {asdict(Size())}, {TOKENS} tokens, {time.perf_counter() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

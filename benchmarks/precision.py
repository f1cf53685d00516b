"""Students in mixed precision, bfloat16 and float32: same batches, several seeds, held-out KL to the teacher.

    python benchmarks/precision.py --teacher MODEL --student FOLDER --cache CACHE --held TEXT [--seeds 3]
        [--steps 183 --batch-size 16 --learning-rate 1e-3] [--json PATH]

All arms train from one cache with plain (not compiled) steps: AdamW, warm-up, cosine, alpha 1, T = 2. A
table at the end has the mean over the seeds and, after it, the standard deviation; results are written as
they come.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip
import mlx.optimizers as optim

from pipeline.console import Console, table
from pipeline.evaluate import EvalOptions, evaluate
from pipeline.text import packed_text
from pmetal_distill import DistillConfig, Distiller, LogitCache, load_model
from pmetal_distill.precision import StudentPrecision

ARMS: tuple[StudentPrecision, ...] = ("float32", "mixed", "bfloat16")
WARMUP = 30
FIGURES = ("kl@1", "kl@2", "top1", "perplexity")


def train(args: Any, cache: LogitCache, precision: StudentPrecision, seed: int) -> tuple[Any, dict[str, Any]]:
    """A student after all steps, with its speed."""
    mx.random.seed(seed)
    student = load_model(args.student)
    decay = optim.cosine_decay(args.learning_rate, max(1, args.steps - WARMUP), 0.1 * args.learning_rate)
    warmup = optim.linear_schedule(args.learning_rate / WARMUP, args.learning_rate, WARMUP)
    optimizer = optim.AdamW(optim.join_schedules([warmup, decay], [WARMUP]), bias_correction=True)
    config = DistillConfig(temperature=2.0, alpha=1.0, max_grad_norm=1.0, precision=precision, compiled=False)
    distiller = Distiller(cache, student, config, optimizer=optimizer)
    mx.reset_peak_memory()
    tokens, started, losses = 0, 0.0, []
    with cache.batches(batch_size=args.batch_size, seed=seed) as batches:
        for step in range(args.steps):
            if step == 5:  # after the kernels were built
                tokens, started = 0, time.perf_counter()
            batch = next(batches)
            losses.append(distiller.step(batch).soft.item())
            tokens += int(batch.loss_mask.sum())
    speed = tokens / (time.perf_counter() - started)
    found = {"tokens_per_second": speed, "peak_gb": mx.get_peak_memory() / 1e9, "last_loss": losses[-1]}
    return student, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("teacher", "student", "cache", "held"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=183)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    teacher, cache, console = load_model(args.teacher), LogitCache(args.cache), Console(quiet=True)
    held = packed_text(args.held, teacher, split="train", max_seq_len=1024)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        for precision in ARMS:
            started = time.perf_counter()
            student, found = train(args, cache, precision, seed)
            student.model.eval()
            figures = evaluate(teacher, student, held, options=EvalOptions(batch_size=16), console=console)
            rows.append({"precision": precision, "seed": seed, **found, **{n: figures[n] for n in FIGURES}})
            print(f"{time.perf_counter() - started:6.1f} s", json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))
            del student
            gc.collect()
            mx.clear_cache()
    device = mx.device_info().get("device_name", mx.default_device())
    print(f"\n{device}, {args.steps} steps, {args.seeds} seeds")
    print(summary(rows))


def summary(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, and the deviations of the divergences."""
    lines: list[list[Any]] = []
    for precision in ARMS:
        own = [row for row in rows if row["precision"] == precision]
        means = {
            name: statistics.mean(row[name] for row in own)
            for name in (*FIGURES, "tokens_per_second", "peak_gb")
        }
        spread = [statistics.stdev([row[n] for row in own]) if len(own) > 1 else 0.0 for n in FIGURES[:2]]
        lines.append(
            [
                precision,
                *(means[name] for name in FIGURES),
                means["tokens_per_second"],
                means["peak_gb"],
                *spread,
            ]
        )
    names = [
        "precision",
        "KL, T=1",
        "KL, T=2",
        "top 1",
        "perplexity",
        "tokens/s",
        "peak GB",
        "sd T=1",
        "sd T=2",
    ]
    return table(names, lines)


if __name__ == "__main__":
    main()

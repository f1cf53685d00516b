"""How good students get from each kind of target, against a student trained on the teacher's full logits.

Teacher: SmolLM2-135M-Instruct (or --teacher). Student: some of its layers. Every row trains the same student
on the same batches in the same order for as many steps, and differs in the target alone; "full" is a live
teacher. Judged by KL(teacher || student) and agreement on documents that neither training nor calibration has
seen, of two kinds of text. Each target is cached once. Rows that the results file holds are not run again, so
an interrupted run goes on. At the end: an epoch from the sketch cache against one beside the live teacher,
steps interleaved.

    python benchmarks/student_quality.py [--steps 90] [--seeds 0,1] [--only kl,lora] [--quick]
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip

from benchmarks.student_results import METRICS, Results, Row, tables
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.data import PackedDataset, split_by_size
from pipeline.demo import demo_teacher
from pipeline.demo_text import demo_documents
from pipeline.evaluate import EvalOptions, evaluate
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.text import packed_text
from pipeline.training.config import distill_config
from pipeline.training.optimizing import build_optimizer
from pipeline.training.source import Source, open_source
from pmetal_distill.adapters import AdapterSpec, add_adapters
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.students import init_student

QUIET = Console(quiet=True)
SPLIT_SEED = 0
CHARS_PER_TOKEN = 4
LONGEST_DOCUMENT = 8_000
QUICK = {
    "steps": 4,
    "train_tokens": 6_000,
    "eval_tokens": 500,
    "batch_size": 2,
    "seq_len": 128,
    "sketch_rank": 64,
    "calibration_tokens": 2_000,
    "timed_steps": 4,
}
TARGETS: dict[str, dict[str, Any]] = {
    "sketch": {"tail": "sketch"},
    "bucket": {"tail": "bucket", "top_k": 64},
    "none": {"tail": "none", "top_k": 64},
}
FULL, SKETCH = ("full logits, live teacher", "live"), ("sketch, top 16", "sketch")
ROWS = (
    Row("kl", *FULL),
    Row("kl", *SKETCH),
    Row("kl", "bucket, top 64", "bucket"),
    Row("kl", "top 64 renormalised", "none"),
    Row("jensen_shannon", *FULL, {"loss": "jensen_shannon"}),
    Row("jensen_shannon", *SKETCH, {"loss": "jensen_shannon"}),
    Row("kl + cosine", *FULL, {"hidden_loss": "cosine", "hidden_layers": "third"}),
    Row("kl + cosine", *SKETCH, {"hidden_loss": "cosine", "hidden_layers": "third"}),
    Row("lora", "start, not trained", "start"),
    Row("lora", "LoRA, sketch", "sketch", {"fine_tune_type": "lora"}),
    Row("lora", "DoRA, sketch", "sketch", {"fine_tune_type": "dora"}),
)


@dataclass(slots=True, eq=False)
class Bench:
    """Teacher, student, texts and caches in a working folder."""

    args: argparse.Namespace
    teacher_path: str
    teacher: LoadedModel
    work: Path

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers at a third, two thirds and the end."""
        count = self.teacher.num_layers
        return tuple(sorted({max(count * i // 3 - 1, 0) for i in (1, 2, 3)}))

    @property
    def student(self) -> Path:
        path = self.work / "student"
        if not path.exists():
            init_student(self.teacher, num_layers=self.args.num_layers, out=path)
        return path

    def write_texts(self) -> None:
        """Documents of each text on two sides, those of training mixed in one file."""
        folder = self.work / "data"
        folder.mkdir(parents=True, exist_ok=True)
        names, trained = self.args.texts.split(","), []
        for name in names:
            train, test = split_by_size(demo_documents(name), fraction=0.25, seed=SPLIT_SEED)
            trained += take(train, self.args.train_tokens // len(names))
            write_lines(self.test_file(name), take(test, self.args.eval_tokens // len(names)))
        random.Random(SPLIT_SEED).shuffle(trained)
        write_lines(folder / "train.jsonl", trained)

    def test_file(self, name: str) -> Path:
        return self.work / "data" / f"test-{name}.jsonl"

    def cache(self, target: str) -> tuple[Path, float]:
        """The cache of a target, made once, and its bytes a token without hidden states."""
        out = self.work / f"cache-{target}"
        settings = CacheSettings(
            teacher=self.teacher_path,
            data=str(self.work / "data" / "train.jsonl"),
            out=out,
            max_seq_len=self.args.seq_len,
            sketch_rank=self.args.sketch_rank,
            calibration_tokens=self.args.calibration_tokens,
            hidden_layers=self.layers if target == "sketch" else (),
            resume=True,
            **TARGETS[target],
        )
        return out, run_cache(settings, QUIET, teacher=self.teacher)["bytes_per_token"]

    def settings(self, row: Row, seed: int) -> TrainSettings:
        """The settings of a run."""
        changes = dict(row.changes)
        if changes.get("hidden_layers") == "third":
            changes["hidden_layers"] = self.layers
        if "fine_tune_type" in changes:
            changes["learning_rate"] = self.args.lora_learning_rate
        values: dict[str, Any] = {
            "student": str(self.student),
            "out": self.work / "unused",
            "iters": self.args.steps,
            "batch_size": self.args.batch_size,
            "learning_rate": self.args.learning_rate,
            "temperature": self.args.temperature,
            "alpha": 1.0,
            "seed": seed,
        }
        if row.target == "live":
            data = str(self.work / "data" / "train.jsonl")
            values |= {"teacher": self.teacher_path, "data": data, "max_seq_len": self.args.seq_len}
        else:
            values["cache"] = self.cache("sketch" if row.target == "start" else row.target)[0]
        return TrainSettings(**(values | changes))

    def evaluate(self, student: LoadedModel) -> dict[str, dict[str, float]]:
        """Figures on the held-out documents of each text, and on all of them."""
        student.model.eval()
        found: dict[str, dict[str, float]] = {}
        for name in self.args.texts.split(","):
            held_out: PackedDataset = packed_text(
                str(self.test_file(name)), self.teacher, split="train", max_seq_len=self.args.seq_len
            )
            found[name] = evaluate(self.teacher, student, held_out, options=EvalOptions(), console=QUIET)
        tokens = {name: values["tokens"] for name, values in found.items()}
        pooled = {
            metric: sum(tokens[name] * found[name][metric] for name in tokens) / sum(tokens.values())
            for metric in METRICS
        }
        return {**found, "all": {**pooled, "tokens": sum(tokens.values())}}


def take(documents: Sequence[Any], tokens: int) -> list[str]:
    """Texts of documents in random order, about so many tokens of them."""
    mixed, left, found = list(documents), tokens * CHARS_PER_TOKEN, []
    random.Random(SPLIT_SEED).shuffle(mixed)
    for document in mixed:
        part = document.text[: min(left, LONGEST_DOCUMENT)]
        if part:
            found.append(part)
        left -= len(part)
    return found


def write_lines(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def open_run(settings: TrainSettings) -> tuple[Source, Distiller]:
    """Source and distiller of a run, as `train` sets them up."""
    student = load_model(settings.student)
    source = open_source(settings, student, QUIET)
    if settings.fine_tune_type != "full":
        parameters = settings.lora_parameters
        spec = AdapterSpec(settings.fine_tune_type, parameters.rank, parameters.scale)
        student = add_adapters(student, spec, seed=settings.seed)
    config = distill_config(settings, source.hidden_layers)
    return source, Distiller(source.teacher, student, config, optimizer=build_optimizer(settings))


def train(bench: Bench, row: Row, seed: int) -> dict[str, Any]:
    """Trains and evaluates one row."""
    settings = bench.settings(row, seed)
    source, distiller = open_run(settings)
    started, soft = time.perf_counter(), float("nan")
    steps = 0 if row.target == "start" else settings.iters
    with source.batches(batch_size=settings.batch_size, seed=seed) as batches:
        for _ in range(steps):
            soft = float(distiller.step(next(batches)).soft.item())
    seconds = time.perf_counter() - started
    held_out = bench.evaluate(distiller.student)
    size = bench.cache(row.target)[1] if row.target in TARGETS else None
    return {"held_out": held_out, "last_soft": soft, "seconds": seconds, "bytes_per_token": size}


def epoch_times(bench: Bench) -> dict[str, float]:
    """An epoch from the sketch cache and one beside the live teacher, from the medians of interleaved steps.

    Both read the same batches; the first step of each is left out. Reading is included.
    """
    runs = {row.target: open_run(bench.settings(row, 0)) for row in ROWS[:2]}
    size, steps = bench.args.batch_size, bench.args.timed_steps
    times: dict[str, list[float]] = {name: [] for name in runs}
    readers = {name: source.batches(batch_size=size, seed=0) for name, (source, _) in runs.items()}
    for step in range(steps + 1):
        for name in sorted(runs, reverse=step % 2 == 1):
            started = time.perf_counter()
            runs[name][1].step(next(readers[name]))
            times[name].append(time.perf_counter() - started)
    per_epoch = readers["live"].num_batches_per_epoch
    for reader in readers.values():
        reader.close()
    offline, online = (statistics.median(times[name][1:]) * per_epoch for name in ("sketch", "live"))
    pairs = [a / b for a, b in zip(times["sketch"][1:], times["live"][1:], strict=True)]
    return {
        "offline_epoch_seconds": offline,
        "online_epoch_seconds": online,
        "ratio": statistics.median(pairs),
        "least_ratio": min(pairs),
        "largest_ratio": max(pairs),
        "batches_an_epoch": per_epoch,
        "timed_steps": steps,
    }


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    unimportant = {"work", "json", "only", "seeds", "quick", "timed_steps", "skip_times"}
    setup = {name: value for name, value in vars(args).items() if name not in unimportant}
    results = Results.open(args.json or args.work / "results.json", setup)
    teacher = args.teacher or str(demo_teacher())
    bench = Bench(args, teacher, load_model(teacher), args.work)
    bench.write_texts()
    rows = [row for row in ROWS if args.only is None or row.group in args.only.split(",")]
    for seed in seeds:
        for row in rows:
            key = f"{row.key}, seed {seed}"
            if key not in results.rows:
                results.rows[key] = train(bench, row, seed)
                results.save()
                found = results.rows[key]
                figures = ", ".join(f"{m} {found['held_out']['all'][m]:.4g}" for m in METRICS)
                print(f"{key}: {figures}; {found['seconds']:.0f} s", flush=True)
            mx.clear_cache()
    for text in ("all", *args.texts.split(",")):
        for shown in tables(results, rows, text, seeds):
            print(f"\n{shown}")
    if not args.skip_times:
        results.epoch = results.epoch or epoch_times(bench)
        results.save()
        e = results.epoch
        print(
            f"\nepoch from the cache {e['offline_epoch_seconds']:.0f} s, beside the teacher "
            f"{e['online_epoch_seconds']:.0f} s: ratio {e['ratio']:.2f} "
            f"({e['least_ratio']:.2f} to {e['largest_ratio']:.2f} over {e['timed_steps']} pairs of steps)"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--num-layers", type=int, default=10, help="layers of the student")
    parser.add_argument("--texts", default="python-docs,numpy-docs", help="of pipeline.demo_text")
    parser.add_argument("--train-tokens", type=int, default=60_000, help="about so many, over all texts")
    parser.add_argument("--eval-tokens", type=int, default=6_000, help="about so many, over all texts")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--lora-learning-rate", type=float, default=1e-3)
    parser.add_argument("--sketch-rank", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--seeds", default="0", help="of the order of the batches")
    parser.add_argument(
        "--only", default=None, help=f"groups: {', '.join(dict.fromkeys(r.group for r in ROWS))}"
    )
    parser.add_argument("--timed-steps", type=int, default=12)
    parser.add_argument("--skip-times", action="store_true", help="no comparison of epoch times")
    parser.add_argument("--work", type=Path, default=Path("runs/student-quality"), help="caches, results")
    parser.add_argument("--json", type=Path, default=None, help="results file instead of the one in --work")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
        if args.work == parser.get_default("work"):
            args.work = args.work.with_name("student-quality-quick")
    return args


if __name__ == "__main__":
    main()

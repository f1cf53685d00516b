"""Which layers and neurons of a teacher make the best student: KL to it before and after training.

Teacher: SmolLM2-135M-Instruct (or --teacher). Measured on 2,048 tokens; judged on documents that neither
measuring nor training has seen, of two kinds of text. Training: --steps of 8 x 512 tokens beside the live
teacher, forward KL at T = 1, AdamW, peak learning rate 4e-4; for a GPU.

    python benchmarks/students.py [--layers 20,15,12,10] [--widths 0.75,0.5,0.25] [--steps 300] [--seeds 0,1]
                                  [--ways evenly,again] [--json PATH]
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from pipeline.console import table
from pipeline.demo import demo_teacher
from pipeline.demo_text import demo_documents
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.evaluation import Comparison, compare_hidden
from pmetal_distill.models import LoadedModel, build_model, load_model, wrap_model
from pmetal_distill.students import (
    PrunedModel,
    block_influence,
    evenly_spaced,
    influential_layers,
    largest,
    neuron_importance,
    prune_layers,
    prune_mlp,
)
from pmetal_distill.teaching import TextBatch

LENGTH, MEASURED, JUDGED, BATCH = 512, 4, 16, 8
TEMPERATURES = (1.0, 2.0)
PEAK, WARMUP = 4e-4, 20


@dataclass(slots=True, eq=False)
class Bench:
    """The teacher and its texts, token ids [n, 512] each."""

    teacher: LoadedModel
    trained: np.ndarray
    measured: TextBatch
    judged: dict[str, np.ndarray]

    @staticmethod
    def of(teacher: LoadedModel) -> "Bench":
        docs = {name: [d.text or "" for d in demo_documents(name)] for name in ("python-docs", "numpy-docs")}
        for texts in docs.values():
            random.Random(0).shuffle(texts)
        python, numpy = docs["python-docs"], docs["numpy-docs"]
        halves, quarter = len(python) // 2, len(numpy) * 3 // 4
        mixed = python[:halves] + numpy[:quarter]
        random.Random(1).shuffle(mixed)
        ids = _rows(teacher, mixed)
        measured = _spread(ids, MEASURED)
        judged = {
            "python-docs": _spread(_rows(teacher, python[halves:]), JUDGED),
            "numpy-docs": _spread(_rows(teacher, numpy[quarter:]), JUDGED),
        }
        return Bench(teacher, ids, TextBatch.of(measured), judged)

    def student(self, pruned: PrunedModel) -> LoadedModel:
        model = build_model(pruned.config)
        model.load_weights(list(pruned.weights.items()))
        return wrap_model(model, self.teacher.tokenizer, pruned.config)

    def kl(self, student: LoadedModel, ids: np.ndarray) -> dict[str, float]:
        """KL(teacher || student) at each temperature, nats."""
        comparison = Comparison(TEMPERATURES)
        for start in range(0, len(ids), 4):
            tokens = mx.array(ids[start : start + 4])
            teacher, other = (m.hidden(tokens).final for m in (self.teacher, student))
            compare_hidden(
                comparison,
                teacher_head=self.teacher.logits,
                teacher_hidden=teacher.reshape(-1, teacher.shape[-1]),
                student_head=student.logits,
                student_hidden=other.reshape(-1, other.shape[-1]),
                labels=mx.full(tokens.size, -100),
                chunk_size=2048,
            )
        return {name: value for name, value in comparison.summary().items() if name.startswith("kl@")}

    def judge(self, student: LoadedModel) -> list[float]:
        return [value for ids in self.judged.values() for value in self.kl(student, ids).values()]

    def loss_without(self, layers: Sequence[int]) -> list[float]:
        """KL at T = 1 on the measured text when one layer more is left out, for each of `layers`."""
        ids = self.measured.token_ids
        losses = []
        for layer in layers:
            pruned = prune_layers(self.teacher, [other for other in layers if other != layer])
            model = build_model(pruned.config)
            model.load_weights(list(pruned.weights.items()))
            losses.append(self.kl(replace(self.teacher, model=model), ids)["kl@1"])
        return losses

    def train(self, student: LoadedModel, steps: int, seed: int) -> None:
        ramp = optim.linear_schedule(1e-5, PEAK, WARMUP)
        decay = optim.cosine_decay(PEAK, max(1, steps - WARMUP), PEAK / 10)
        optimizer = optim.AdamW(optim.join_schedules([ramp, decay], [WARMUP]), bias_correction=True)
        config = DistillConfig(alpha=1.0, temperature=1.0, max_grad_norm=1.0)
        distiller = Distiller(self.teacher, student, config, optimizer=optimizer)
        for numbers in _batches(len(self.trained), steps, seed):
            distiller.step(self.trained[numbers])


def _rows(teacher: LoadedModel, texts: Sequence[str]) -> np.ndarray:
    ids = np.array(teacher.tokenizer.encode("\n\n".join(texts)), np.int32)
    count = len(ids) // LENGTH
    return ids[: count * LENGTH].reshape(count, LENGTH)


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return chosen


def _batches(count: int, steps: int, seed: int) -> Iterator[list[int]]:
    generator, left = np.random.default_rng(seed), []
    for _ in range(steps):
        if len(left) < BATCH:
            left = generator.permutation(count).tolist()
        yield [left.pop() for _ in range(BATCH)]


def by_loss_once(bench: Bench, counts: Sequence[int]) -> dict[int, list[int]]:
    losses = bench.loss_without(range(bench.teacher.num_layers))
    return {count: np.sort(np.argsort(losses)[-count:]).tolist() for count in counts}


def by_loss_again(bench: Bench, counts: Sequence[int]) -> dict[int, list[int]]:
    layers, found = list(range(bench.teacher.num_layers)), {}
    while len(layers) > min(counts):
        layers.pop(int(np.argmin(bench.loss_without(layers))))
        if len(layers) in counts:
            found[len(layers)] = list(layers)
    return found


def by_influence_once(bench: Bench, counts: Sequence[int]) -> dict[int, list[int]]:
    influence = block_influence(bench.teacher, [bench.measured])
    return {count: np.sort(np.argsort(influence)[-count:]).tolist() for count in counts}


def by_influence_again(bench: Bench, counts: Sequence[int]) -> dict[int, list[int]]:
    return {count: influential_layers(bench.teacher, count, [bench.measured]) for count in counts}


def evenly(bench: Bench, counts: Sequence[int]) -> dict[int, list[int]]:
    return {count: evenly_spaced(bench.teacher.num_layers, count) for count in counts}


WAYS: dict[str, tuple[str, Callable[[Bench, Sequence[int]], dict[int, list[int]]]]] = {
    "evenly": ("evenly spaced", evenly),
    "once": ("influence, measured once", by_influence_once),
    "again": ("influence, again after each layer (--by importance)", by_influence_again),
    "loss": ("loss without the layer, measured once", by_loss_once),
    "loss-again": ("loss without the layer, again after each", by_loss_again),
}


def layer_rows(bench: Bench, args: argparse.Namespace) -> Iterator[list[Any]]:
    counts = [int(count) for count in args.layers.split(",") if count]
    for way in args.ways.split(",") if counts else ():
        name, choose = WAYS[way]
        for count, layers in choose(bench, counts).items():
            before = bench.judge(bench.student(prune_layers(bench.teacher, layers)))
            yield [count, name, 0, *before]
            for seed in range(0) if not args.steps else map(int, args.seeds.split(",")):
                student = bench.student(prune_layers(bench.teacher, layers))
                bench.train(student, args.steps, seed)
                yield [count, f"{name}, seed {seed}", args.steps, *bench.judge(student)]


def width_rows(bench: Bench, args: argparse.Namespace) -> Iterator[list[Any]]:
    measured = neuron_importance(bench.teacher, [bench.measured])
    drawn = np.random.default_rng(0)
    scores = {
        "activation x weight norm (--mlp-width)": measured,
        "product of the norms of the weights": [_norms(block.mlp) for block in bench.teacher.model.layers],
        "at random": [drawn.random(len(score)) for score in measured],
    }
    for share in map(float, filter(None, args.widths.split(","))):
        for name, score in scores.items():
            neurons = largest(score, int(share * len(score[0])))
            yield [share, name, 0, *bench.judge(bench.student(prune_mlp(bench.teacher, neurons)))]


def _norms(mlp: Any) -> np.ndarray:
    rows = [np.linalg.norm(np.array(mlp[name].weight), axis=1) for name in ("gate_proj", "up_proj")]
    norms: np.ndarray = rows[0] * rows[1] * np.linalg.norm(np.array(mlp.down_proj.weight), axis=0)
    return norms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--teacher")
    parser.add_argument("--layers", default="20,15,12,10")
    parser.add_argument("--widths", default="0.75,0.5,0.25")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench.of(load_model(args.teacher or demo_teacher()))
    kls = [f"{name} T={t:g}" for name in bench.judged for t in TEMPERATURES]
    header = ["kept", "chosen", "steps", *kls]
    found: list[list[Any]] = []
    for rows in (layer_rows(bench, args), width_rows(bench, args)):
        for row in rows:
            found.append(row)
            print(*row, flush=True)
            if args.json:
                args.json.write_text(json.dumps({"header": header, "rows": found}))
    print(table(header, found))


if __name__ == "__main__":
    main()

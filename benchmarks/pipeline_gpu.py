"""The pipeline on a GPU: a random Llama of about 1B, V = 151936, bf16; kernels against plain operations.

    python benchmarks/pipeline_gpu.py [--sequences 4096 --checked 64 --length 1024 --iters 12] [--json PATH]
    python benchmarks/pipeline_gpu.py --parts cache

Prints tokens a second of the bare teacher (body and head on the same rows, nothing kept) and of `cache` with
the kernels on, over all sequences, for each tail: a bucket with a head of 64, a sketch with its default of
16. The bare teacher runs before and after each; their mean counts. Those of `cache` count all tokens from the
first batch to the last commit; calibration, the reading of text and the hashing of weights stand beside them.
`--profile` adds a run with the seconds of each phase (`benchmarks/phases.py`). Then, over fewer sequences,
`cache` and `train` with the kernels and with PMETAL_KERNELS=plain, and how far the results are apart; and an
epoch of `train` over all sequences, behind its first third, for the share of its time that it waits for data.
Needs 40 GB of GPU memory.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_map

from benchmarks.phases import timed
from pipeline.cache import read_data, run_cache, target_spec
from pipeline.console import Console
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.stage_one import QUEUED_BATCHES
from pipeline.teacher import TeacherRunner
from pipeline.training.run import run_train
from pmetal_distill.kernels import VARIABLE, backend, engaged, reset_engaged
from pmetal_distill.losses.plain import token_slices
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.capture import PendingCapture, rows_at_once
from pmetal_distill.offline.reader import LogitCache
from tests.tiny import random_model, save_tokenizer, tiny_config

QUIET = Console(quiet=True)
PARTS = ("cache", "train", "wait")


@dataclass(slots=True)
class Check:
    """Sizes, folders and results.

    Attributes:
        folder: for the models, the text, the caches and the runs.
        vocab: tokens of the models; the tokenizer has fewer.
        layers: of the teacher and of the student.
        width: hidden size.
        sequences, length: of the text.
        iters: training steps.
        chunk: rows of logits that exist at once in stage one.
        step: of the sketch. A random model's logits spread less than a real one's: at 20 its coordinates
            take as many bytes as those of a real one at 60.
        checked: sequences of the part that is run with plain operations too.
    """

    folder: Path
    vocab: int
    layers: tuple[int, int]
    width: int
    sequences: int
    length: int
    iters: int
    chunk: int
    step: float
    checked: int
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, **values: Any) -> None:
        """Keeps a result and prints it at once."""
        self.results.append({"name": name, **values})
        shown = "  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{name:34s} {shown}", flush=True)

    def cache_settings(self, name: str, tail: Any, *, text: str = "text") -> CacheSettings:
        """Stage one into a folder of this name."""
        return CacheSettings(
            teacher=str(self.folder / "teacher"),
            data=str(self.folder / f"{text}.jsonl"),
            out=self.folder / name,
            sketch_step=self.step,
            max_seq_len=self.length,
            batch_size=8,
            top_k=64 if tail == "bucket" else 16,
            tail=tail,
            head_chunk=self.chunk,
            sequences_per_shard=32,
        )

    def train_settings(self, cache: str, name: str) -> TrainSettings:
        """Stage two from one cache into a folder of this name."""
        return TrainSettings(
            student=str(self.folder / "student"),
            cache=str(self.folder / cache),
            out=self.folder / name,
            iters=self.iters,
            batch_size=8,
            learning_rate=1e-4,
            steps_per_report=1,
        )


def write_model(folder: Path, *, vocab: int, layers: int, width: int, seed: int) -> None:
    """A Llama with random bf16 weights as a folder that mlx_lm loads."""
    folder.mkdir()
    heads = max(4, width // 64)
    config = tiny_config(vocab_size=vocab, hidden_size=width, num_layers=layers) | {
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": max(2, heads // 4),
        "head_dim": width // heads,
        "max_position_embeddings": 4096,
    }
    model = random_model(config, seed=seed, scale=1.0)
    weights = tree_map(lambda w: w.astype(mx.bfloat16), model.parameters())
    model.update(weights)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)


def write_text(path: Path, *, tokens: int) -> None:
    """Random letters, about so many tokens, in documents of about 16,000 tokens."""
    rng = np.random.default_rng(0)
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz     .,"))
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, tokens, 1 << 14):
            count = min(1 << 14, tokens - start)
            file.write(json.dumps({"text": "".join(rng.choice(alphabet, count))}) + "\n")


def prepare(check: Check) -> LoadedModel:
    """Writes models and text; the loaded teacher."""
    for index, name in enumerate(("teacher", "student")):
        layers = check.layers[index]
        write_model(check.folder / name, vocab=check.vocab, layers=layers, width=check.width, seed=index)
    write_text(check.folder / "text.jsonl", tokens=check.sequences * check.length)
    write_text(check.folder / "part.jsonl", tokens=check.checked * check.length)
    mx.clear_cache()
    teacher = load_model(str(check.folder / "teacher"))
    count = sum(w.size for w in _leaves(teacher.model.parameters()))
    check.add("device", **{k: str(v) for k, v in mx.device_info().items()}, mlx=mx.__version__)
    check.add("teacher", parameters=count, vocab=check.vocab)
    return teacher


def bare_teacher(check: Check, teacher: LoadedModel, *, capture: bool = False) -> float:
    """Tokens a second of body and head alone, in the batches, rows and chunks of stage one; nothing is kept.

    With `capture`, targets are captured too and come to the host, where nobody takes them.
    """
    settings = check.cache_settings("unused", "bucket")
    data, spec = read_data(settings, teacher), target_spec(settings, teacher.vocab_size)
    runner = TeacherRunner(teacher, data, settings.batch_size)
    waiting: deque[PendingCapture] = deque()
    mx.reset_peak_memory()
    start = time.perf_counter()
    for states in runner.run(range(data.num_sequences)):
        if capture:
            waiting.append(PendingCapture(states.final, teacher.logits, spec, chunk=check.chunk))
            if len(waiting) > QUEUED_BATCHES:
                waiting.popleft().result()
            continue
        for rows in token_slices(len(states.final), check.chunk):
            mx.async_eval(teacher.logits(states.final[rows]))
    mx.synchronize()
    speed = data.num_tokens / (time.perf_counter() - start)
    name = f"{'captured' if capture else 'bare teacher'}, chunk {check.chunk}"
    peak = mx.get_peak_memory() / 1e9
    check.add(name, tokens=data.num_tokens, tokens_per_second=speed, peak_gb=peak)
    return speed


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Sets the environment variable of the kernels."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def run_stage_one(check: Check, teacher: LoadedModel, settings: CacheSettings, name: str) -> float:
    """One run of `cache`: its speed, and what lies beside it."""
    shutil.rmtree(settings.out, ignore_errors=True)
    reset_engaged()
    mx.reset_peak_memory()
    start = time.perf_counter()
    with timed() if "profile" in name else nullcontext({}) as phases:
        found = run_cache(settings, QUIET, teacher=teacher)
    seconds = time.perf_counter() - start
    check.add(
        f"{settings.out.name} ({backend()}, {name})",
        tokens=found["new_tokens"],
        tokens_per_second=found["tokens_per_second"],
        calibration_seconds=found["calibration_seconds"],
        start_seconds=seconds - found["seconds"],
        bytes_per_token=float(found["bytes_per_token"]),
        peak_gb=mx.get_peak_memory() / 1e9,
        engaged=engaged(),
    )
    for phase, took in phases.items():
        check.add(f"  {phase}", seconds=took)
    return float(found["tokens_per_second"])


def speed_of_stage_one(check: Check, teacher: LoadedModel, tails: list[str], *, profile: bool) -> None:
    """`cache` with the kernels between two runs of the bare teacher, after a short run that compiles them."""
    for tail in tails:
        run_stage_one(check, teacher, check.cache_settings(f"warm-{tail}", tail, text="part"), "first")
    bare_teacher(check, teacher, capture=True)
    before = bare_teacher(check, teacher)
    for tail in tails:
        settings = check.cache_settings(f"cache-{tail}", tail)
        speed = run_stage_one(check, teacher, settings, "again")
        after = bare_teacher(check, teacher)
        check.add(f"cache-{tail}", of_bare=2 * speed / (before + after))
        before = after
        if profile:
            run_stage_one(check, teacher, settings, "profile")
        shutil.rmtree(settings.out)


def both_choices(check: Check, teacher: LoadedModel, tail: Any) -> None:
    """`cache` of the smaller part, with the kernels and without."""
    for choice in ("auto", "plain"):
        with kernels(choice):
            settings = check.cache_settings(f"cache-{tail}-{choice}", tail, text="part")
            run_stage_one(check, teacher, settings, "part")


def compare_caches(check: Check, tail: str) -> None:
    """How far the targets of the two caches are apart."""
    one, two = (LogitCache(check.folder / f"cache-{tail}-{c}") for c in ("auto", "plain"))
    worst: dict[str, float] = defaultdict(float)
    for number in range(0, one.num_sequences, max(1, one.num_sequences // 16)):
        a, b = one.sequence(number).targets, two.sequence(number).targets
        worst["ids_differ"] = max(worst["ids_differ"], float((a.head_ids != b.head_ids).mean()))
        for name in ("head_logprobs", "tail_curve", "coordinates"):
            x, y = getattr(a, name), getattr(b, name)
            if x.size:
                worst[name] = max(worst[name], float(np.abs(x - y).max()))
    check.add(f"caches, tail {tail}, kernels against plain", **worst)
    if tail == "sketch":
        for name, figure in one.records[0].measured.items():
            check.add(f"  measured {name}", kernels=figure, plain=two.records[0].measured[name])


def stage_two(check: Check, tail: str) -> None:
    """`train` from the cache that the kernels made, and the loss step by step of both choices."""
    losses = {}
    for choice in ("auto", "plain"):
        with kernels(choice):
            reset_engaged()
            settings = check.train_settings(f"cache-{tail}-auto", f"run-{tail}-{choice}")
            if choice == "auto":
                warm = replace(settings, iters=2, out=check.folder / f"run-{tail}-warm")
                run_train(warm, QUIET)
            start = time.perf_counter()
            run_train(settings, QUIET)
            took = time.perf_counter() - start
            lines = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
            losses[choice] = np.array([line["loss"] for line in lines])
            third = len(lines) // 3
            tokens = lines[-1]["tokens"] - lines[third]["tokens"]
            speed = tokens / (lines[-1]["seconds"] - lines[third]["seconds"])
            check.add(
                f"train-{tail}-{choice} ({backend()})",
                tokens_per_second=speed,
                seconds=took,
                first_loss=float(losses[choice][0]),
                last_loss=float(losses[choice][-1]),
                data_wait=float(lines[-1]["data_wait_share"]),
                engaged=engaged(),
            )
            shutil.rmtree(settings.out)
    apart = np.abs(losses["auto"] / losses["plain"] - 1)
    check.add(f"losses, tail {tail}, kernels against plain", first=float(apart[0]), worst=float(apart.max()))


def waiting(check: Check, tail: Any) -> None:
    """One epoch of `train` over a cache of all the text: the share of the time that it waits for batches."""
    cache = check.cache_settings(f"long-{tail}", tail)
    run_cache(cache, QUIET)
    settings = check.train_settings(cache.out.name, f"run-long-{tail}")
    run_train(replace(settings, iters=check.sequences // settings.batch_size), QUIET)
    lines = [json.loads(line) for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[len(lines) // 3], lines[-1]
    seconds = last["seconds"] - first["seconds"]
    waited = last["data_wait_share"] * last["seconds"] - first["data_wait_share"] * first["seconds"]
    check.add(
        f"train-long-{tail} ({backend()})",
        steps=len(lines) - len(lines) // 3,
        tokens_per_second=(last["tokens"] - first["tokens"]) / seconds,
        data_wait=waited / seconds,
    )
    shutil.rmtree(settings.out)
    shutil.rmtree(cache.out)


def _leaves(tree: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(tree)
    return [array for _, array in flat]


def main() -> int:
    """Runs all parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, nargs=2, default=(16, 4), metavar=("TEACHER", "STUDENT"))
    parser.add_argument("--sequences", type=int, default=4096)
    parser.add_argument("--checked", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--iters", type=int, default=12)
    parser.add_argument("--chunk", type=int, help="by default that of `cache`")
    parser.add_argument("--step", type=float, default=20.0)
    parser.add_argument("--tails", nargs="+", default=["bucket", "sketch"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(
            Path(folder),
            options.vocab,
            tuple(options.layers),
            options.width,
            options.sequences,
            options.length,
            options.iters,
            rows_at_once(options.chunk, options.vocab),
            options.step,
            options.checked,
        )
        teacher = prepare(check)
        if "cache" in options.parts:
            speed_of_stage_one(check, teacher, options.tails, profile=options.profile)
        for tail in options.tails if "train" in options.parts else ():
            both_choices(check, teacher, tail)
            compare_caches(check, tail)
            stage_two(check, tail)
        for tail in options.tails if "wait" in options.parts else ():
            waiting(check, tail)
    if options.json:
        options.json.write_text(json.dumps(check.results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

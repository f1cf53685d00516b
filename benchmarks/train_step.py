"""A training step from a cache against mlx-lm's cross-entropy step: same student, same tokens, in one run.

    python benchmarks/train_step.py                       both sizes, about four minutes on two CPU cores
    python benchmarks/train_step.py --sizes tiny
    python benchmarks/train_step.py --sizes 0.4b --dtype bfloat16      for a GPU
    MLX_MAX_MB_PER_BUFFER=100 python benchmarks/train_step.py ...      on CUDA, as `train` sets it

`mlx_lm` is the compiled step of `mlx_lm.tuner.trainer`: `default_loss` and AdamW. `bucket` and `sketch` are
steps of a `Distiller` with AdamW from caches of that kind, at alpha 0.5 and T 2, without clipping, which
mlx-lm does not do. All take turns, so that a busy machine slows all of them; the median round counts. `read`
is the time to read and decode a batch without prefetching, as a share of the step. `peak MB` is what three
steps in a row take at most beyond what they find there (weights, optimizer, a sketch's basis of 4 V (r + 1)
bytes), by MLX's count and Python's (NumPy). How far it has come goes to stderr.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from benchmarks.letters import write_letters
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import LoadedModel, load_tokenizer, wrap_model
from pmetal_distill.offline.reader import LogitCache
from tests.tiny import random_model, save_tokenizer, tiny_config

TAILS = ("bucket", "sketch")
STARTED = time.perf_counter()
Step = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a student and its batches; `rank` is that of the sketch."""

    width: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    rank: int


SIZES = {
    "tiny": Size(64, 4, 256, 4, 2, 1024, 4, 64, 32),
    "135m, 10 layers": Size(576, 10, 1536, 9, 3, 49152, 4, 256, 256),
    "0.4b": Size(1024, 16, 4096, 16, 8, 128256, 8, 1024, 256),
    "1b": Size(2048, 16, 8192, 32, 8, 128256, 8, 1024, 256),
}


def say(what: str) -> None:
    """One line about how far it has come, to stderr."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {what}", file=sys.stderr, flush=True)


def model_config(size: Size, *, width: int, layers: int, **config: Any) -> dict[str, Any]:
    """A Llama's config.json for the vocabulary of a size."""
    return tiny_config(
        hidden_size=width, num_layers=layers, vocab_size=size.vocab, max_position_embeddings=4096, **config
    )


def write_teacher(folder: Path, size: Size, dtype: mx.Dtype) -> None:
    """A teacher of one block, just wide enough for the sketch."""
    folder.mkdir()
    config = model_config(size, width=max(64, size.rank), layers=1)
    model = random_model(config, seed=1)
    model.set_dtype(dtype)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)


def write_inputs(folder: Path, size: Size, tails: Sequence[str], dtype: mx.Dtype) -> None:
    """A teacher, text without packing for two batches of full length, and a cache of each kind."""
    write_teacher(folder / "teacher", size, dtype)
    write_letters(folder / "text.jsonl", documents=2 * size.batch, characters=4 * size.length // 3)
    say("teacher and text written")
    for tail in tails:
        settings = CacheSettings(
            teacher=str(folder / "teacher"),
            data=str(folder / "text.jsonl"),
            out=folder / tail,
            max_seq_len=size.length,
            tail=tail,
            pack=False,
            sketch_rank=size.rank,
            calibration_tokens=min(2048, 4 * size.batch * size.length),
        )
        found = run_cache(settings, Console(quiet=True))
        say(f"cache '{tail}' of {found['tokens']} tokens, calibration {found['calibration_seconds']:.1f} s")


def student(folder: Path, size: Size, dtype: mx.Dtype) -> LoadedModel:
    """The same random weights at every call, in memory only."""
    config = model_config(
        size,
        width=size.width,
        layers=size.layers,
        intermediate_size=size.inner,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.width // size.heads,
    )
    model = random_model(config)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return wrap_model(model, load_tokenizer(folder / "teacher"), config)


def full_batches(cache: LogitCache, size: Size) -> list[Any]:
    """The batches whose sequences are all of full length."""
    whole = cache.numbers[cache.lengths == size.length]
    with cache.batches(batch_size=size.batch, seed=0, epochs=1, subset=whole, prefetch=0) as batches:
        return [batch for batch in batches if len(batch.token_ids) == size.batch]


def cross_entropy_step(folder: Path, tail: str, size: Size, dtype: mx.Dtype) -> Step:
    """One step of `mlx_lm.tuner.trainer.train`, at the same number of positions."""
    from mlx_lm.tuner.trainer import default_loss

    model, optimizer = student(folder, size, dtype).model, optim.AdamW(learning_rate=1e-5)
    first = full_batches(LogitCache(folder / tail), size)[0]
    ids = np.pad(first.token_ids, ((0, 0), (0, 1)))
    batch = mx.array(ids), mx.array([[0, size.length - 1]] * size.batch)
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradients = value_and_grad(model, ids, lengths)
        optimizer.update(model, gradients)
        return loss, count

    def run() -> None:
        loss, count = step(*batch)
        mx.eval(state, loss, count)

    model.train()
    return run


def distiller_step(
    folder: Path, tail: str, size: Size, dtype: mx.Dtype, chunk_tokens: int | None
) -> tuple[Step, float]:
    """One step of a distiller, and the seconds to read a batch of files that are open and checked."""
    cache = LogitCache(folder / tail)
    full_batches(cache, size)
    started = time.perf_counter()
    batches = full_batches(cache, size)
    reading = (time.perf_counter() - started) / len(batches)
    optimizer = optim.AdamW(learning_rate=1e-5)
    config = DistillConfig(chunk_tokens=chunk_tokens)
    distiller = Distiller(cache, student(folder, size, dtype), config, optimizer=optimizer)
    return lambda: distiller.step(batches[0], upcoming=batches[0]), reading


def median_seconds(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Of each step, run in turns after two rounds that warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            mx.synchronize()
            times[name].append(time.perf_counter() - start)
            say(f"round {turn}, {name}: {times[name][-1]:.4f} s{', not counted' if turn < 2 else ''}")
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def peak_bytes(step: Step) -> int:
    """What three steps take at most beyond what is there before them: MLX's arrays, and NumPy's."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    for _ in range(3):
        step()
    mx.synchronize()
    _, host = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return max(0, mx.get_peak_memory() - before) + host


def report(name: str, size: Size, options: argparse.Namespace) -> None:
    """A table for one size."""
    dtype = getattr(mx, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), size, options.tails, dtype)
        steps = {"mlx_lm": cross_entropy_step(Path(folder), options.tails[0], size, dtype)}
        reading = {}
        for tail in options.tails:
            for chunk in options.chunk_tokens or [None]:
                step = f"{tail}@{chunk}" if chunk else tail
                steps[step], reading[step] = distiller_step(Path(folder), tail, size, dtype, chunk)
        say("students made")
        seconds = median_seconds(steps, options.rounds)
        peaks = {step: peak_bytes(steps[step]) for step in steps}
    print(f"\n{name}, {size}, {options.dtype}")
    print(f"{'step':12}{'seconds':>9}{'of mlx_lm':>11}{'tokens/s':>10}{'peak MB':>9}{'read':>7}")
    for step, value in seconds.items():
        read = f"{reading[step] / value:7.1%}" if step in reading else ""
        rate = size.batch * size.length / value
        ratio, peak = value / seconds["mlx_lm"], peaks[step] / 1e6
        print(f"{step:12}{value:9.4f}{ratio:11.2f}{rate:10.0f}{peak:9.0f}{read}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["tiny", "135m, 10 layers"], choices=SIZES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tails", nargs="+", default=TAILS, choices=TAILS)
    parser.add_argument("--chunk-tokens", type=int, nargs="+", help="tokens whose logits exist at once")
    options = parser.parse_args()
    say("imported")
    print(f"MLX {mx.__version__}, {mx.default_device()}, NumPy {np.__version__}")
    for name in options.sizes:
        report(name, SIZES[name], options)


if __name__ == "__main__":
    main()

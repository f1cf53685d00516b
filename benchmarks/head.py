"""Time and memory of head and loss: full logits against the chunked head, plain and host. About 2 minutes.

    python benchmarks/head.py                      the table: N = 1024, V = 49,152, d = 576
    python benchmarks/head.py --memory             peak memory at N = 1,024, 4,096 and 16,384, d = 8
    python benchmarks/head.py --tokens 4096 --dtype bfloat16

Data are random. Every variant computes the same loss (alpha 0.5, T = 2) and the gradients by hidden states
and head matrix, one after the other in each round, so that a busy machine slows all of them; the median round
counts.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pmetal_distill  # noqa: F401  (loads OpenBLAS before MLX)

import mlx.core as mx  # isort: skip
import numpy as np

from pmetal_distill.losses import Divergence, HeadOptions, HeadParts, head_loss, head_rows
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from schemas.curve import TailCurve

VOCAB, TEMPERATURE = 49152, 2.0
NODES = (0.125, 0.25, 0.5, 0.75, 1.0)
Step = Callable[[mx.array, mx.array], Any]


def make_target(kind: str, num_tokens: int, *, k: int = 16, rank: int = 256) -> TeacherTarget:
    """A random cached target; head probabilities fall off, the tail holds about half the mass at T=2."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((num_tokens, 4 * k)), axis=-1)[:, :k].astype(np.int32)
    ids = ids * (VOCAB // (4 * k))
    logprobs = -np.cumsum(rng.exponential(0.3, (num_tokens, k)), axis=-1).astype(np.float32) - 0.5
    curve = TailCurve(NODES, VOCAB, k)
    values = np.log(VOCAB) * (1 - np.array(NODES, np.float32)) - 3 * np.array(NODES, np.float32)
    tail = mx.array(np.broadcast_to(values, (num_tokens, len(NODES))).astype(np.float32))
    if kind == "bucket":
        return TeacherTarget.bucket(mx.array(ids), mx.array(logprobs), tail, curve=curve)
    basis = TailBasis(mx.random.normal((VOCAB,)), mx.random.normal((VOCAB, rank)) * 0.1)
    y = mx.random.normal((num_tokens, rank))
    return TeacherTarget.sketch(mx.array(ids), mx.array(logprobs), tail, y, curve=curve, bases=[basis])


def variants(target: TeacherTarget, labels: mx.array, loss: str) -> dict[str, Step]:
    """Functions of (hidden, weight) that return the loss and both gradients."""
    soft, divergence = target.at(TEMPERATURE), Divergence(loss)
    mask = mx.ones(labels.shape)

    def cross_entropy(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        return (
            mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        ).mean()

    def full(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        distance = divergence_loss(logits, target, divergence=divergence, temperature=TEMPERATURE)
        return 0.5 * TEMPERATURE**2 * distance.mean() + 0.5 * hard_cross_entropy(logits, labels).mean()

    def chunked(backend: Any) -> Callable[[mx.array, mx.array], mx.array]:
        options = HeadOptions(backend=backend)

        def run(hidden: mx.array, weight: mx.array) -> mx.array:
            return head_loss(
                hidden, HeadParts(weight), soft, labels, mask, divergence=divergence, options=options
            ).total

        return run

    functions = {
        "cross-entropy only, full logits": cross_entropy,
        "full logits": full,
        "chunked, plain": chunked("plain"),
        "chunked, auto": chunked("auto"),
    }
    steps: dict[str, Step] = {name: mx.value_and_grad(f, argnums=(0, 1)) for name, f in functions.items()}
    steps["chunked, compiled"] = mx.compile(mx.value_and_grad(chunked("plain"), argnums=(0, 1)))
    steps["the three products"] = products
    steps["evaluation rows"] = lambda h, w: head_rows(h, HeadParts(w), [soft], labels, mask)
    return steps


def products(hidden: mx.array, weight: mx.array) -> list[mx.array]:
    """What no method can avoid, full size."""
    rows = hidden @ weight.T
    return [rows @ weight, rows.T @ hidden]


def peak_bytes(step: Step, hidden: mx.array, weight: mx.array) -> int:
    """Highest memory during a step above what its inputs hold: MLX's and NumPy's together."""
    mx.eval(step(hidden, weight))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    mx.eval(step(hidden, weight))
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return int(mx.get_peak_memory() - before + numpy_peak)


def median_seconds(
    steps: dict[str, Step], hidden: mx.array, weight: mx.array, rounds: int
) -> dict[str, float]:
    """Median seconds of each step, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            mx.eval(step(hidden, weight))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def inputs(num_tokens: int, width: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Hidden states, head matrix, labels."""
    mx.random.seed(0)
    hidden = mx.random.normal((num_tokens, width)).astype(dtype)
    weight = (mx.random.normal((VOCAB, width)) * (2.0 / width**0.5)).astype(dtype)
    return hidden, weight, mx.random.randint(0, VOCAB, (num_tokens,))


def print_times(options: argparse.Namespace) -> None:
    """One table a kind of target."""
    for kind in ("bucket", "sketch"):
        hidden, weight, labels = inputs(options.tokens, options.width, getattr(mx, options.dtype))
        steps = variants(make_target(kind, options.tokens), labels, options.loss)
        mx.eval(hidden, weight, labels)
        seconds = median_seconds(steps, hidden, weight, options.rounds)
        print(f"\n{kind}, N={options.tokens}, V={VOCAB}, d={options.width}, {options.dtype}, {options.loss}")
        print(f"{'variant':34}{'seconds':>9}{'of full logits':>16}{'peak MiB':>10}")
        for name, value in seconds.items():
            memory = peak_bytes(steps[name], hidden, weight) / 2**20
            print(f"{name:34}{value:9.3f}{value / seconds['full logits']:16.2f}{memory:10.0f}")


def print_memory(options: argparse.Namespace) -> None:
    """Peak MiB by number of tokens."""
    names = ("full logits", "chunked, plain", "chunked, compiled", "chunked, auto")
    for kind in ("bucket", "sketch"):
        print(f"\npeak MiB, {kind}, V={VOCAB}, d=8, {options.loss}")
        print(f"{'N':>7}" + "".join(f"{name:>20}" for name in names))
        for num_tokens in (1024, 4096, 16384):
            hidden, weight, labels = inputs(num_tokens, 8, mx.float32)
            steps = variants(make_target(kind, num_tokens), labels, options.loss)
            row = []
            for name in names:
                skipped = name == "full logits" and num_tokens > 1024
                row.append("-" if skipped else f"{peak_bytes(steps[name], hidden, weight) / 2**20:.0f}")
            print(f"{num_tokens:7}" + "".join(f"{cell:>20}" for cell in row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--loss", default="forward_kl")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"MLX {mx.__version__}, {mx.default_device()}, NumPy {np.__version__}")
    (print_memory if options.memory else print_times)(options)


if __name__ == "__main__":
    main()

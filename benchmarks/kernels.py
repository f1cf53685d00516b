"""Kernels: correctness against float64 first, then times beside plain MLX, compiled MLX and, if there, Liger.

    python benchmarks/kernels.py [--json PATH] [--rows 8192 --vocab 151936] [--sections check,loss]

Runs on whatever device MLX has. Times are set against the copy bandwidth measured in the same run: one "pass"
is the time to move [rows, vocab] once. A section that fails is reported and the others go on; the exit code
is then 1. About six minutes on one H100, most of it compilation: MLX's CUDA back end takes two seconds a
kernel and keeps none on disk. --no-tune leaves out the search for launch shapes.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip

from benchmarks import kernel_cases as cases
from benchmarks import kernel_checks, kernel_rivals
from pmetal_distill.device import on_gpu
from pmetal_distill.kernels import backend, capture, ops, row, tuning
from schemas.spec import DEFAULT_NODES

K = 64
LAUNCHES = ((256, 1), (512, 1), (1024, 1), (256, 2), (512, 2), (256, 4), (512, 4))


@dataclass
class Bench:
    """Sizes, results, and the bandwidth that all sections are measured against."""

    rows: int
    vocab: int
    tune: bool
    repeats: int
    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    all_types: bool = True  # also check float16
    bandwidth: float = 1.0  # bytes a second, read plus written
    dtypes: tuple[str, ...] = ("bf16", "fp32")

    def add(self, section: str, name: str, dtype: str, **values: Any) -> None:
        """Keeps a result and prints it at once."""
        self.results.append({"section": section, "name": name, "dtype": dtype, **values})
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{section:8s} {dtype:5s} {name:46s} {shown}", flush=True)

    def timed(self, section: str, name: str, dtype: str, took: float, *, rows: int = 0, **more: Any) -> None:
        """Keeps a time, with how many passes over [rows, vocab] it is worth."""
        nbytes = (rows or self.rows) * self.vocab * cases.DTYPES[dtype].size
        self.add(section, name, dtype, ms=took * 1e3, passes=took * self.bandwidth / nbytes, **more)

    def expect(self, name: str, dtype: str, bound: float, **errors: float) -> None:
        """Keeps errors and fails where one is above the bound (or not a number)."""
        good = all(e <= bound for e in errors.values())
        self.add("check", name, dtype, **errors, verdict="ok" if good else "WRONG")
        if not good:
            self.failures.append(f"check {name} {dtype}")

    def explore(
        self,
        name: str,
        dtype: str,
        function: Callable[[], Any],
        launches: Iterable[tuple[int, int]] = LAUNCHES,
        *,
        rows: int = 0,
    ) -> None:
        """Times `function` in several launch shapes, best first."""
        if not self.tune or backend() == "plain":
            return
        found: list[tuple[float, tuning.Shape]] = []

        def attempt(shape: tuning.Shape) -> None:
            try:
                with tuning.using(shape):
                    found.append((cases.seconds(function, self.repeats), shape))
            except (RuntimeError, ValueError) as error:
                print(f"   {name} {dtype} {shape}: {str(error)[:300]}", flush=True)

        for threads, unroll in launches:
            attempt(tuning.Shape(threads, unroll, 0))
        if found:
            best = min(found, key=lambda f: f[0])[1]
            attempt(tuning.Shape(best.threads, best.unroll, 1))
        for took, s in sorted(found, key=lambda f: f[0]):
            label = f"{name} [{s.threads} x {s.unroll}, hint {s.hint}]"
            self.timed("tune", label, dtype, took, rows=rows, kernel=name)


def check(bench: Bench) -> None:
    """Every kernel against float64."""
    bench.failures += kernel_checks.run(
        bench.vocab, (*bench.dtypes, *(("fp16",) if bench.all_types else ())), bench.expect
    )


def copy(bench: Bench) -> None:
    """Copy bandwidth: x + 1 over [rows, vocab]; and one read by mx.logsumexp."""
    for dtype in bench.dtypes:
        x = cases.random_logits(bench.rows, bench.vocab, cases.DTYPES[dtype], seed=5)
        took = cases.seconds(lambda x=x: x + 1, bench.repeats)
        bench.bandwidth = max(bench.bandwidth, 2 * x.nbytes / took)
        bench.timed("copy", "x + 1 (one read, one write)", dtype, took, GBps=2 * x.nbytes / took / 1e9)
        took = cases.seconds(lambda x=x: mx.logsumexp(x, axis=-1), bench.repeats)
        bench.timed("copy", "mx.logsumexp (one read)", dtype, took, GBps=x.nbytes / took / 1e9)
        del x
        mx.clear_cache()


def loss(bench: Bench) -> None:
    """The sparse loss with cross-entropy at full size: each kernel tuned, then all of it against others."""
    for dtype in bench.dtypes:
        z = cases.random_logits(bench.rows, bench.vocab, cases.DTYPES[dtype], seed=6)
        target, labels = cases.bucket_target(bench.rows, bench.vocab, K)
        _tune_loss(bench, dtype, z, target, labels)
        _time_loss(bench, dtype, z, target, labels)
        rows = [0, 1, bench.rows // 2, bench.rows - 1]
        _, slope = cases.reference_bucket(cases.float64(z[mx.array(rows)]), target, labels, rows)
        _, g = cases.loss_and_rows(z, target, labels, ops=ops)
        error = kernel_checks.relative(cases.float64(g[mx.array(rows)]) * bench.rows, slope)
        bench.expect("gradient at full size, 4 rows", dtype, 4 * kernel_checks.GRAIN[dtype], gradient=error)
        del z, target, labels, g
        mx.clear_cache()


def _tune_loss(bench: Bench, dtype: str, z: mx.array, target: Any, labels: mx.array) -> None:
    ids, b, n = target.head_ids, target.inv_temperature, bench.rows
    weights = (mx.full((n,), 0.3 / n), mx.full((n,), 0.7 / n), mx.full((n,), 14.0))
    head, label = mx.zeros((n, K)), mx.zeros((n,))

    def slope() -> mx.array:
        return row.tail_slope(z, ids, labels, b, weights=weights, head=head, label=label)

    bench.explore("forward", dtype, lambda: row.tail_sums(z, ids, labels, b))
    bench.explore("backward", dtype, slope)
    if backend() == "plain":
        return
    for temperature in (1.0, 1.7):
        inverse = mx.array(1 / temperature)
        took = cases.seconds(lambda i=inverse: row.tail_sums(z, ids, labels, i), bench.repeats)
        bench.timed("loss", f"forward at T={temperature}", dtype, took)


def _time_loss(bench: Bench, dtype: str, z: mx.array, target: Any, labels: mx.array) -> None:
    def ours() -> Any:
        return cases.loss_and_rows(z, target, labels, ops=ops)

    def own_plain() -> Any:
        return cases.loss_and_rows(z, target, labels)

    autodiff = mx.value_and_grad(lambda x: cases.written_plainly(x, target, labels))
    entropy = mx.value_and_grad(lambda x: mx.fast.cross_entropy(x, labels).mean())
    times = {}
    for name, function, repeats in (
        ("ours", ours, bench.repeats),
        ("ours, compiled", mx.compile(ours), bench.repeats),
        ("PMETAL_KERNELS=plain", own_plain, 1),
        ("PMETAL_KERNELS=plain, compiled", mx.compile(own_plain), 1),
        ("plain autodiff", lambda: autodiff(z), 1),
        ("plain autodiff, compiled", mx.compile(lambda: autodiff(z)), 1),
        ("mx.fast.cross_entropy alone", lambda: entropy(z), 1),
    ):
        times[name] = cases.seconds(function, repeats)
        extra = round(cases.peak_bytes(function) / z.nbytes, 3)
        bench.timed("loss", f"forward + backward, {name}", dtype, times[name], peak_in_logits=extra)
    ours_best = min(times["ours"], times["ours, compiled"])
    for name in times:
        if "ours" not in name:
            bench.add("loss", f"speed-up over {name}", dtype, ratio=times[name] / ours_best)


def captures(bench: Bench) -> None:
    """Capture against MLX's selections."""
    for dtype in bench.dtypes:
        z = cases.random_logits(bench.rows, bench.vocab, cases.DTYPES[dtype], seed=7)
        bench.explore(
            "capture",
            dtype,
            lambda z=z: capture(z, k=K, nodes=DEFAULT_NODES),
            ((128, 1), (256, 1), (512, 1), (256, 2)),
        )
        repeats = bench.repeats if backend() != "plain" else 1
        for k in (16, K, 256):
            took = cases.seconds(lambda z=z, k=k: capture(z, k=k, nodes=DEFAULT_NODES), repeats)
            bench.timed("capture", f"ours k={k}, 7 nodes", dtype, took)
        took = cases.seconds(lambda z=z: capture(z, k=K, nodes=(0.13, 0.3, 0.51, 0.77, 1.0)), repeats)
        bench.timed("capture", "ours k=64, 5 nodes off the grid", dtype, took)
        for name, function in (
            ("mx.argpartition", lambda z=z: mx.argpartition(z, -K, axis=-1)[:, -K:]),
            ("mx.topk", lambda z=z: mx.topk(z, K, axis=-1)),
        ):
            bench.timed("capture", name, dtype, cases.seconds(function, 1))
        del z, function
        mx.clear_cache()


def pairs(bench: Bench) -> None:
    """Losses on complete targets (half the rows: two of them and a gradient must fit)."""
    n = bench.rows // 2
    for dtype in bench.dtypes:
        z, t = (cases.random_logits(n, bench.vocab, cases.DTYPES[dtype], seed=s) for s in (8, 9))
        target, labels = cases.dense_target(t), mx.zeros((n,), mx.int32)
        shapes = ((256, 1), (512, 1), (1024, 1), (256, 2), (512, 2))
        for name, count in (("forward_kl", 6), ("reverse_kl", 6), ("jensen_shannon", 8)):

            def step(z: mx.array = z, target: Any = target, labels: Any = labels, name: str = name) -> Any:
                return cases.loss_and_rows(z, target, labels, ops=ops, name=name)

            if name != "reverse_kl":
                bench.explore(f"dense {name}", dtype, step, shapes, rows=n)
            took = cases.seconds(step, bench.repeats)
            bench.timed("pair", f"dense {name} + hard, {count} passes at least", dtype, took, rows=n)
        autodiff = mx.value_and_grad(lambda x, t=t: cases.dense_plainly(x, t))
        for name, function in (("", autodiff), (", compiled", mx.compile(autodiff))):
            mx.clear_cache()
            took = cases.seconds(lambda f=function, z=z: f(z), 1)
            bench.timed("pair", f"dense forward_kl, plain autodiff{name}", dtype, took, rows=n)
        del z, t, target, autodiff, function, step
        mx.clear_cache()


def hidden(bench: Bench) -> None:
    """MSE and cosine on hidden states [rows, 4096]."""
    for dtype in bench.dtypes:
        s, t = (cases.random_logits(bench.rows, 4096, cases.DTYPES[dtype], seed=i) for i in (10, 11))
        for name, function in (
            ("ours", mx.value_and_grad(cases.hidden_loss)),
            ("plain", mx.value_and_grad(cases.hidden_plainly)),
            ("plain, compiled", mx.compile(mx.value_and_grad(cases.hidden_plainly))),
        ):
            took = cases.seconds(lambda f=function, s=s, t=t: f(s, t), 20)
            passes = took * bench.bandwidth / s.nbytes
            bench.add("hidden", f"MSE + cosine, {name} (5 at least)", dtype, ms=took * 1e3, passes=passes)


def liger(bench: Bench) -> None:
    """Another library's kernels on the same device."""
    mx.clear_cache()
    n = bench.rows // 2

    def report(name: str, dtype: str, took: float) -> None:
        bench.timed("liger", name, dtype, took, rows=n)

    kernel_rivals.run(n, bench.vocab, report)


SECTIONS = {f.__name__: f for f in (check, copy, loss, captures, pairs, hidden, liger)}


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "kernels": backend(),
        "device": {k: v for k, v in info.items() if isinstance(v, str | int | float)},
    }


def summary(bench: Bench) -> None:
    """The figures once more, as one table, and the best launch shapes."""
    print(f"\n{'section':8s} {'dtype':5s} {'what':56s} {'ms':>9s} {'passes':>8s}")
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for r in bench.results:
        if r["section"] == "tune":
            best.setdefault((r["kernel"], r["dtype"]), r)
        elif "ms" in r:
            print(f"{r['section']:8s} {r['dtype']:5s} {r['name']:56s} {r['ms']:9.3f} {r['passes']:8.2f}")
        elif "ratio" in r:
            print(f"{r['section']:8s} {r['dtype']:5s} {r['name']:56s} {r['ratio']:8.2f}x")
    for r in best.values():
        print(f"{'best':8s} {r['dtype']:5s} {r['name']:56s} {r['ms']:9.3f} {r['passes']:8.2f}")


def main() -> int:
    """Runs the sections asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", default="bf16,fp32,fp16")
    parser.add_argument("--no-tune", action="store_true")
    options = parser.parse_args()
    rows = options.rows or (8192 if on_gpu() else 32)
    vocab = options.vocab or (151936 if on_gpu() else 32000)
    bench = Bench(rows, vocab, not options.no_tune, options.repeats)
    bench.all_types = "fp16" in options.dtypes
    bench.dtypes = tuple(d for d in options.dtypes.split(",") if d != "fp16")
    where = environment()
    print(json.dumps(where), f"rows {rows} vocab {vocab}", flush=True)
    for name in options.sections.split(","):
        start = time.perf_counter()
        try:
            SECTIONS[name](bench)
        except Exception as error:  # noqa: BLE001  (a failing section must not hide the others)
            traceback.print_exc(limit=8)
            bench.failures.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            mx.clear_cache()
        print(f"-- {name}: {time.perf_counter() - start:.1f} s", flush=True)
        if options.json:
            found = {"environment": where, "results": bench.results, "failures": bench.failures}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    summary(bench)
    print("FAILED: " + "; ".join(bench.failures) if bench.failures else "all sections passed", flush=True)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())

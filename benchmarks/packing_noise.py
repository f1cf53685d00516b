"""What rounding, leaks and packing do to a model in each type, and the verdict. Costs nine passes a line.

    python benchmarks/packing_noise.py --model PATH [--dtype float32 bfloat16 float16] [--bits 4 8]

PATH is whatever `load_model` takes. All figures are shares of the spread of a row of logits; the words are
those of `pmetal_distill.modelling.evidence`. Drift and residual must be below one limit, and what is left of
a leak below another.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache

from pipeline.console import table
from pmetal_distill.modelling.anatomy import CacheKind, examine, run_packed
from pmetal_distill.modelling.evidence import FAILURES, Evidence, Packed, Probe, vocabulary
from pmetal_distill.models import LoadedModel, load_model

COLUMNS = (
    "type",
    "roundoff",
    "noise",
    "leak",
    "drift",
    "residual",
    "limit",
    "left",
    "limit",
    "found",
    "seconds",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub id or .gguf file")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--bits", nargs="*", type=int, default=[], help="quantize copies of the first type")
    return parser.parse_args()


def versions(loaded: LoadedModel, options: argparse.Namespace) -> Iterator[str]:
    """Names of what `loaded.model` is turned into, one after another."""
    weights = loaded.model.parameters()
    for name in options.dtype:
        loaded.model.update(tree_map(lambda w: w, weights))
        loaded.model.set_dtype(getattr(mx, name))
        yield name
    for bits in options.bits:
        fresh = load_model(options.model)
        fresh.model.set_dtype(getattr(mx, options.dtype[0]))
        nn.quantize(fresh.model, bits=bits)
        loaded.model.update_modules(fresh.model.leaf_modules())
        yield f"{bits} bits, {options.dtype[0]}"


def row(name: str, loaded: LoadedModel) -> list[Any]:
    """One line of the table."""
    model, windows = loaded.model, loaded.anatomy.windows
    caches = [CacheKind(type(c).__name__, getattr(c, "max_size", None)) for c in make_prompt_cache(model)]
    started = time.perf_counter()
    try:
        anatomy = examine(model, caches, loaded.config, source=name)
        found = f"{anatomy.packing}, body {anatomy.body is not None}, head {anatomy.head is not None}"
    except FAILURES as error:
        found = str(error)
    seconds = time.perf_counter() - started
    probe = Probe.below(vocabulary(loaded.config))
    evidence = Evidence.of(model, probe, model(probe.alone, cache=None))
    left = what_is_left(model, probe, windows, evidence)
    figures = [
        evidence.roundoff,
        evidence.noise,
        evidence.leak,
        evidence.drift,
        left.residual,
        evidence.largest_residual,
        left.leak,
        evidence.largest_leak,
    ]
    return [name, *(f"{figure:.1e}" for figure in figures), found, f"{seconds:.2f}"]


def what_is_left(
    model: nn.Module, probe: Probe, windows: tuple[int | None, ...], evidence: Evidence
) -> Packed:
    """Of packing in a batch, or where the model takes no batch of masks, of one row at a time."""
    try:
        return evidence.packed(run_packed(model, probe, windows, "batch"))
    except FAILURES:
        return evidence.packed(run_packed(model, probe, windows, "rows"))


def main() -> None:
    options = arguments()
    loaded = load_model(options.model)
    print(f"device {mx.default_device()}, {loaded.num_layers} layers, {loaded.vocab_size} tokens")
    print(table(list(COLUMNS), [row(name, loaded) for name in versions(loaded, options)]))


if __name__ == "__main__":
    main()

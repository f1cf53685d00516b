"""What several processes on one machine cost: start, sums, `cache`, a step of `train`. About five minutes.

    python benchmarks/ranks.py [--sizes 1,2,3] [--rounds 3]

Runs the commands under `mlx.launch` (ring over loopback) on a random Llama of 9M weights, one BLAS thread a
process, W = 1, 2, 3 in turn, round after round, and prints the least of each time. More processes than cores
take turns, so their times say what the exchange costs, not what more machines would bring.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.letters import write_letters
from tests.tiny import build_tiny_model

MEGABYTES = (1, 4, 16, 64)
SHARDED_SIZE = 2  # what the model's heads allow
CACHE_OPTIONS = ("--tail", "bucket", "--max-seq-len", 256, "--batch-size", 4, "--sequences-per-shard", 4)
TRAIN_OPTIONS = ("--batch-size", 6, "--iters", 6, "--steps-per-report", 2, "--save-every", 1000)
Row = dict[str, float]


def launch(size: int, *words: object) -> tuple[dict[str, Any], float]:
    """Runs a program in `size` processes; the object that the first one prints, and the seconds it took."""
    command = ["mlx.launch", "-n", size, "--env", "OPENBLAS_NUM_THREADS=1", "--"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = time.perf_counter()
    done = subprocess.run(
        [*map(str, command), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
        cwd=Path(__file__).resolve().parents[1],
    )
    seconds = time.perf_counter() - started
    if done.returncode or "{" not in done.stdout:
        sys.exit(f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    text = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    return json.loads(text), seconds


def add_up(megabytes: list[int]) -> None:
    """What each process does for the sums: the least of ten times, in seconds, by megabytes of float32."""
    import mlx.core as mx

    from pmetal_distill.parallel import World

    world = World.launched()
    found = {}
    for size in megabytes:
        values = mx.ones(size * 250_000)
        times = []
        for _ in range(10):
            world.all(True)
            started = time.perf_counter()
            world.sum(values)
            times.append(time.perf_counter() - started)
        found[size] = min(times)
    if world.leads:
        print(json.dumps(found))


def measure(folder: Path, size: int, name: str) -> Row:
    """One round of everything with `size` processes; seconds but for the gradient's megabytes."""
    out = folder / f"{size}-{name}"
    row: Row = {}
    _, row["start"] = launch(size, sys.executable, __file__, "--sums")
    sums, _ = launch(size, sys.executable, __file__, "--sums", *MEGABYTES)
    row |= {f"sum of {size} MB": seconds for size, seconds in sums.items()}
    words = ("--teacher", folder / "model", "--data", folder / "text.jsonl", "--out", out / "cache")
    cached, row["cache, with start"] = launch(
        size, "pmetal-pipeline", "cache", *words, *CACHE_OPTIONS, "--json"
    )
    row["cache, its pass"] = cached["new_tokens"] / cached["tokens_per_second"]
    words = ("--teacher", folder / "model", "--data", folder / "text.jsonl", "--out", out / "sharded")
    row["cache --sharded, its pass"] = float("nan")
    if size == SHARDED_SIZE:
        cached, _ = launch(size, "pmetal-pipeline", "cache", *words, *CACHE_OPTIONS, "--json", "--sharded")
        row["cache --sharded, its pass"] = cached["new_tokens"] / cached["tokens_per_second"]
    words = ("--student", folder / "model", "--cache", out / "cache", "--out", out / "run")
    _, row["train, with start"] = launch(size, "pmetal-pipeline", "train", *words, *TRAIN_OPTIONS, "--json")
    reports = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = reports[0], reports[-1]
    steps = last["iteration"] - first["iteration"]
    row["train, a step"] = (last["seconds"] - first["seconds"]) / steps
    return row


def main() -> None:
    """Measures in rounds and prints the least of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sums", nargs="*", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sums is not None:
        add_up(options.sums)
        return
    sizes = [int(size) for size in options.sizes.split(",")]
    found: dict[int, list[Row]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_tiny_model(folder / "model", hidden_size=384, num_layers=6, vocab_size=2048, tokenizer_size=320)
        weights = (folder / "model" / "model.safetensors").stat().st_size
        write_letters(folder / "text.jsonl", documents=32, characters=600)
        for number in range(options.rounds):
            for size in sizes:
                found[size].append(measure(folder, size, str(number)))
    print(
        f"gradients: {weights / 1e6:.1f} MB; {os.cpu_count()} cores; the least of {options.rounds} rounds, s"
    )
    print(f"{'':25}", *(f"{f'W = {size}':>8}" for size in sizes))
    for name in found[sizes[0]][0]:
        print(f"{name:25}", *(f"{min(row[name] for row in found[size]):8.4f}" for size in sizes))


if __name__ == "__main__":
    main()

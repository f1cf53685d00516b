"""Whether memory stays flat: resident bytes of `cache`, then of its reader, over a million tokens. Minutes.

    python benchmarks/steady.py [--tokens 1000000] [--length 128]

A random teacher of 0.1M weights writes a cache with sketches by the real command; a second process reads all
of it, shuffled, with prefetch. Both are child processes, looked at from here every 20 ms (/proc, so Linux)
against the tokens that they have committed or handed out. Shown are the highest of each tenth of the tokens
from the second on, how far these are apart (largest over smallest), and how far all samples are. Exit code 1
if the highest are apart by more than 1.05. The end, where `cache` reads what it says of all, is left out.

Sequences are short because MLX's CPU build allocates some operations ahead and gives all back: at 512 tokens
the attention scores of a batch, 34 MB apiece, come and go, once or twice at a time.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.tiny import SENTENCES, build_tiny_model

LIMIT = 1.05
SAMPLE_SECONDS = 0.02
PAGE_BYTES = 4096
Curve = list[tuple[int, int]]


def write_text(path: Path, *, tokens: int) -> None:
    """Documents of 30 shuffled words, about 96 tokens; at least `tokens` tokens."""
    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    count = -(-tokens // 80)
    lines = (json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(count))
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def resident_bytes(pid: int) -> int:
    """Of a process that may have ended: 0 then."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def watch(arguments: list[object], tokens_so_far: Callable[[], int]) -> Curve:
    """Runs a program; tokens and resident bytes until it ends."""
    curve = []
    with subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if size := resident_bytes(process.pid):
                curve.append((tokens_so_far(), size))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"the process ended with {process.returncode}")
    return curve


def cache(folder: Path, *, length: int) -> Curve:
    """Memory of `pmetal-pipeline cache`."""
    out = folder / "cache"
    words = [
        *(
            "-c",
            "from pipeline.cli import main; main()",
            "cache",
            "--teacher",
            folder / "teacher",
            "--data",
            folder / "text.jsonl",
        ),
        *("--out", out, "--sketch-rank", 24, "--max-seq-len", length, "--quiet"),
    ]
    curve = watch(words, lambda: len(list((out / "commits").glob("*.json"))))
    tokens = json.loads((out / "dataset.json").read_text())["num_tokens"]
    return [(tokens * shards // curve[-1][0], size) for shards, size in curve]


def read(folder: Path) -> Curve:
    """Memory of a reader."""
    counter = folder / "tokens"
    counter.write_bytes(bytes(8))
    words = [__file__, "--read", folder / "cache", "--counter", counter]
    return watch(words, lambda: int.from_bytes(counter.read_bytes(), "little"))


def read_all(folder: Path, counter: Path) -> None:
    """What the reader's process does: one epoch; after each batch, its tokens go into a file."""
    from pmetal_distill import LogitCache

    tokens = 0
    with (
        counter.open("r+b", buffering=0) as file,
        LogitCache(folder).batches(batch_size=8, seed=0, epochs=1) as batches,
    ):
        for batch in batches:
            tokens += int((batch.documents >= 0).sum())
            file.seek(0)
            file.write(tokens.to_bytes(8, "little"))


def settled(curve: Curve) -> list[tuple[int, int]]:
    """What was seen from the first tenth of the tokens on until the last are done, by tenth."""
    total = max(tokens for tokens, _ in curve)
    tenths = [(10 * tokens // total, size) for tokens, size in curve]
    return [(tenth, size) for tenth, size in tenths if 1 <= tenth < 10]


def highest(curve: Curve) -> list[int]:
    """The most in each tenth."""
    seen = settled(curve)
    return [max(size for tenth, size in seen if tenth == part) for part in range(1, 10)]


def spread(sizes: list[int]) -> float:
    """The largest as a multiple of the smallest."""
    return max(sizes) / min(sizes)


def rows(curves: dict[str, Curve]) -> Iterator[str]:
    """A table."""
    heads = f"{'tokens':>10} {'samples':>8} {'highest':>8} {'all':>6}"
    yield f"{'':8} {heads}   most MB in the second tenth ... the last"
    for name, curve in curves.items():
        seen, most = [size for _, size in settled(curve)], highest(curve)
        shown = " ".join(f"{size / 1e6:.0f}" for size in most)
        apart = f"{spread(most):8.3f} {spread(seen):6.3f}"
        yield f"{name:8} {curve[-1][0]:10,} {len(seen):8,} {apart}   {shown}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--counter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_all(options.read, options.counter)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_tiny_model(folder / "teacher")
        write_text(folder / "text.jsonl", tokens=options.tokens)
        curves = {"cache": cache(folder, length=options.length), "reader": read(folder)}
    print(*rows(curves), sep="\n")
    sys.exit(any(spread(highest(curve)) > LIMIT for curve in curves.values()))


if __name__ == "__main__":
    main()

"""Whether memory stays flat: resident bytes of `cache`, then of its reader, over a million tokens. Minutes.

    python benchmarks/steady.py

A random teacher of 0.1M weights writes a cache with sketches by the real command; a second process reads all
of it, shuffled, with prefetch. Both are child processes, looked at from here (/proc, so Linux) against the
tokens that they have committed or handed out. Exit code 1 if, from the first tenth of the tokens to the last,
the largest exceeds the smallest by more than 5 %; the end, where `cache` reads what it says of the whole, is
shown apart. Sequences are short: at 512 tokens the attention scores of a batch come and go with 34 MB, which
would be all there is to see.
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
LENGTH = 128
SKIPPED_SHARE = 0.1
SAMPLE_SECONDS = 0.02
PAGE_BYTES = 4096
Curve = list[tuple[int, int]]


def write_text(path: Path, *, tokens: int, multiple: int) -> None:
    """Documents of 30 shuffled words, about 96 tokens; at least `tokens` tokens, and full batches only.

    A last batch that is not full would add buffers of other sizes to those that MLX keeps (20 MB here).
    """
    draw = random.Random(0)
    words = " ".join(SENTENCES).split()
    count = -(-tokens // (80 * multiple)) * multiple
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


def cache(folder: Path, *, sequences_per_shard: int) -> Curve:
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
        *("--out", out, "--sketch-rank", 24, "--max-seq-len", LENGTH, "--batch-size", 16, "--quiet"),
        *("--sequences-per-shard", sequences_per_shard, "--no-pack"),
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


def settled(curve: Curve) -> list[int]:
    """Resident bytes from the first tenth of the tokens on until the last are done."""
    total = max(tokens for tokens, _ in curve)
    return [size for tokens, size in curve if SKIPPED_SHARE * total <= tokens < total]


def rows(curves: dict[str, Curve]) -> Iterator[str]:
    """A table."""
    heads = f"{'tokens':>10} {'samples':>8} {'least MB':>9} {'most MB':>8} {'ratio':>6}"
    yield f"{'':8} {heads}   MB at 10, 20 ... 90 % and at the end"
    for name, curve in curves.items():
        sizes, total = settled(curve), curve[-1][0]
        tenths = [next(s for t, s in curve if t >= total * part / 10) for part in range(1, 10)]
        tenths.append(curve[-1][1])
        yield (
            f"{name:8} {total:10,} {len(sizes):8,} {min(sizes) / 1e6:9.1f} {max(sizes) / 1e6:8.1f} "
            f"{max(sizes) / min(sizes):6.3f}   {' '.join(f'{s / 1e6:.0f}' for s in tenths)}"
        )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--sequences-per-shard", type=int, default=64)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--counter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        read_all(options.read, options.counter)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        build_tiny_model(folder / "teacher")
        write_text(folder / "text.jsonl", tokens=options.tokens, multiple=options.sequences_per_shard)
        curves = {
            "cache": cache(folder, sequences_per_shard=options.sequences_per_shard),
            "reader": read(folder),
        }
    print(*rows(curves), sep="\n")
    sys.exit(any(max(s) > LIMIT * min(s) for s in map(settled, curves.values())))


if __name__ == "__main__":
    main()

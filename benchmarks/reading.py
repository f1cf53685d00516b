"""How long a trainer waits for batches, by its speed: the reader as `train` uses it, steps that just pass.

    python benchmarks/reading.py [--tokens 65536 --vocab 49152]              three minutes on two cores

A random teacher of one block writes caches of each kind. Then one epoch in batches of 8 sequences of 512 goes
to a consumer that spends so many microseconds a token as a device would, leaving the cores alone. What it
waits for the next batch is added up behind the first eighth of the batches. An H100 took 8.7 us a token for a
student of four blocks (docs/kernels.md); two CPU cores take 3,600 for ten blocks of SmolLM2-135M.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)
from benchmarks.letters import write_letters
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill.offline.reader import LogitCache
from tests.tiny import build_tiny_model

LENGTH, BATCH = 512, 8
KINDS: dict[str, dict[str, Any]] = {
    "sketch, k = 16": {"tail": "sketch", "top_k": 16},
    "sketch, k = 64": {"tail": "sketch", "top_k": 64},
    "bucket, k = 64": {"tail": "bucket", "top_k": 64},
}


def write_cache(folder: Path, name: str, kind: dict[str, Any], rank: int) -> LogitCache:
    """A cache of the text in the folder."""
    settings = CacheSettings(
        teacher=str(folder / "teacher"),
        data=str(folder / "text.jsonl"),
        out=folder / name,
        max_seq_len=LENGTH,
        sketch_rank=rank,
        calibration_tokens=4096,
        **kind,
    )
    run_cache(settings, Console(quiet=True))
    return LogitCache(folder / name)


def share_waited(cache: LogitCache, microseconds: float) -> float:
    """Of an epoch with a consumer of this speed, the share of the time that it waits for batches."""
    waited = spent = 0.0
    count = -(-cache.num_sequences // BATCH)
    with cache.batches(batch_size=BATCH, seed=0, epochs=1) as batches:
        for number in range(count):
            started = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            time.sleep(batch.token_ids.size * microseconds / 1e6)
            if number >= max(1, count // 8):
                waited += got - started
                spent += time.perf_counter() - started
    return waited / spent


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--microseconds", type=float, nargs="+", default=[16.0, 8.0, 4.0, 2.0])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_tiny_model(
            folder / "teacher", vocab_size=options.vocab, hidden_size=max(options.rank, 64), num_layers=1
        )
        write_letters(folder / "text.jsonl", documents=options.tokens // 1024, characters=1536)
        speeds = "".join(f"{us:>8g} us" for us in options.microseconds)
        print(f"{os.cpu_count()} cores, {options}\n{'waiting at, a token':20}{speeds}")
        for kind, settings in KINDS.items():
            cache = write_cache(folder, kind.replace(", k = ", "-"), settings, options.rank)
            shares = [share_waited(cache, us) for us in options.microseconds]
            print(f"{kind:20}" + "".join(f"{share:11.2%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()

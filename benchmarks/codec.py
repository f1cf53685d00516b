"""Bytes per token by column; encode and decode speed of target shards, tokens per CPU-second.

    python benchmarks/codec.py [CACHE] [--tokens 65536] [--k 16] [--rank 256] [--vocab-size 49152]
                                [--predictor]

Without CACHE: synthetic targets whose statistics resemble SmolLM2-135M (their bytes are not a claim about
real text; their speed is). With CACHE: the shards of that folder as they lie.
"""

import argparse
import io
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.arrays import TargetArrays, TokenRows
from schemas.basis import SketchBasis, plan_groups
from schemas.codebook import Codebook
from schemas.codec import Codec, decode, encode
from schemas.layout import parquet_options
from schemas.predictor import SketchPredictor
from schemas.spec import TargetSpec


def synthetic(args: argparse.Namespace) -> tuple[TargetArrays, TokenRows, Codec]:
    """Heads of Zipf ids, exponential gaps, a plausible curve and coordinates with a power-law spread."""
    rng, n, spec = np.random.default_rng(0), args.tokens, TargetSpec(args.vocab_size, args.k)
    spread = 1400.0 * np.arange(1, args.rank + 1) ** -0.85
    step = 60.0
    mean = np.zeros(args.vocab_size, np.float32)
    components = np.zeros((args.vocab_size, args.rank), np.float32)
    if args.predictor:
        components = (0.1 * rng.normal(size=components.shape)).astype(np.float32)
    basis = SketchBasis(mean, components, step, plan_groups(spread, step))
    ids = (args.vocab_size * rng.random((n, args.k)) ** 4).astype(np.int32)
    gaps = rng.exponential(0.35, (n, args.k - 1)) * np.array([4.0, 2.0] + [1.0] * args.k)[: args.k - 1]
    top = -rng.exponential(0.6, (n, 1))
    logprobs = np.concatenate([top, top - np.cumsum(gaps, axis=1)], axis=1).astype(np.float32)
    slope = rng.normal(9.0, 0.6, (n, 1))
    curve = spec.curve.at_zero - slope * np.tanh(np.array(spec.curve_nodes)) + rng.normal(0, 0.01, (n, 7))
    y = (rng.normal(size=(n, args.rank)) * spread).astype(np.float32)
    if args.predictor:
        shape = (args.rank, args.rank)
        predictor = SketchPredictor(*(10 * rng.normal(size=s) for s in (shape, shape, args.rank)))
        start = time.process_time()
        basis = basis.with_predictor(predictor)
        basis.tables(args.rank)
        print(f"  tables   {time.process_time() - start:.2f} CPU-s once a basis")
        y += basis.predict(ids[:, 0], ids)
    targets = TargetArrays(ids, logprobs, curve.astype(np.float32), y)
    rows = TokenRows(
        ids[:, 0],
        np.arange(n, dtype=np.int32) // 512,
        (np.arange(n, dtype=np.int32) // 200) % 3,
        np.arange(n) % 512 != 511,
    )
    return targets, rows, Codec(spec, basis, Codebook.fit(targets[: n // 4], spec))


def to_parquet(table: pa.Table, codec: Codec, rows_per_group: int) -> bytes:
    """The shard's bytes."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, codec.schema, **parquet_options(codec.schema)) as writer:
        writer.write_table(table, row_group_size=rows_per_group)
    return sink.getvalue()


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of a few runs, in CPU time: other work on the machine does not count."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def read_all(shards: list[bytes], codec: Codec, *, columns: list[str] | None, rank: int | None) -> int:
    """Decode every row group; returns the tokens seen."""
    total = 0
    for shard in shards:
        file = pq.ParquetFile(io.BytesIO(shard), page_checksum_verification=True)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns, use_threads=False)
            total += table.num_rows if columns == [] else len(decode(table, codec, rank=rank)[0])
    return total


def column_bytes(shards: list[bytes]) -> tuple[Counter[str], int]:
    """Compressed bytes by column (headers and footer as `overhead`), and tokens."""
    sizes: Counter[str] = Counter()
    tokens = 0
    for shard in shards:
        meta = pq.ParquetFile(io.BytesIO(shard)).metadata
        tokens += meta.num_rows
        inside = 0
        for group in range(meta.num_row_groups):
            for i in range(meta.num_columns):
                chunk = meta.row_group(group).column(i)
                sizes[chunk.path_in_schema] += chunk.total_compressed_size
                inside += chunk.total_compressed_size
        sizes["footer"] += len(shard) - inside
    return sizes, tokens


def report(shards: list[bytes], codec: Codec) -> None:
    """Print the table."""
    sizes, tokens = column_bytes(shards)
    for name, size in sizes.items():
        print(f"  {name:8s} {size / tokens:8.3f} B/token")
    print(f"  total    {sum(sizes.values()) / tokens:8.3f} B/token")
    for what, rank in (("ids + head + curve", 0), ("whole batch", None)):
        columns = codec.columns(rank=rank)
        seconds = best_seconds(
            lambda rank=rank, columns=columns: read_all(shards, codec, columns=columns, rank=rank)
        )
        print(f"  decode {what:20s} {tokens / seconds:12,.0f} tokens/CPU-s (CRCs verified)")


def main() -> None:
    """Run on synthetic targets or on a cache folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cache", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--predictor", action="store_true", help="predict coordinates from ids")
    args = parser.parse_args()
    pa.set_cpu_count(1)
    if args.cache is not None:
        from pmetal_distill.offline.reader import LogitCache

        cache = LogitCache(args.cache)
        for codec, shards in cache.raw_shards():
            report(shards, codec)
        return
    targets, rows, codec = synthetic(args)
    table, saturation = encode(targets, rows, codec)
    print(f"{args.tokens} synthetic tokens, {saturation}")
    seconds = best_seconds(lambda: encode(targets, rows, codec), 2)
    print(f"  encode   {args.tokens / seconds:12,.0f} tokens/CPU-s")
    for rows_per_group in (2048, 4096, 8192):
        seconds = best_seconds(lambda size=rows_per_group: to_parquet(table, codec, size), 2)
        print(f"rows per group {rows_per_group}: write {args.tokens / seconds:,.0f} tokens/CPU-s")
        report([to_parquet(table, codec, rows_per_group)], codec)


if __name__ == "__main__":
    main()

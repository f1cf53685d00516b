"""Questions to a cache in Polars: where is the teacher unsure, and where is its first choice not the text?

    python examples/read_cache_polars.py CACHE

Needs polars beside what read_cache.py needs. The decoded rows are in memory as a whole.
"""

import sys
from pathlib import Path

import polars as pl
from read_cache import open_cache, rows, text_of


def main(folder: Path) -> None:
    """Prints the answers."""
    tokens = pl.DataFrame(rows(folder))
    stored = pl.scan_parquet(open_cache(folder).shards).select(pl.len(), pl.col("msk").sum()).collect()
    print(f"{stored['len'][0]:,} tokens, {stored['msk'][0]:,} with a target")

    known = tokens.filter(pl.col("next_token") >= 0)
    hit = (pl.col("choice") == pl.col("next_token")).mean()
    print(f"the first choice is the next token in {known.select(hit).item():.4f} of {len(known):,}")

    print("by the teacher's confidence: is it as often right as it believes?")
    confident = known.group_by((pl.col("probability") * 5).floor().clip(0, 4).alias("bin")).agg(
        pl.len(), pl.col("probability").mean(), hit.alias("right")
    )
    for low, count, believed, right in confident.sort("bin").iter_rows():
        share = f"{low / 5:.1f} to {low / 5 + 0.2:.1f}"
        print(f"  {share}: {count} tokens, believes {believed:.3f}, right {right:.3f}")

    print("documents that leave it most unsure")
    documents = tokens.group_by("seq", "doc").agg(pl.len(), pl.col("entropy").mean())
    for seq, doc, count, nats in (
        documents.sort("entropy", "seq", "doc", descending=[True, False, False]).head(5).rows()
    ):
        print(f"  sequence {seq} document {doc}: {nats:.3f} nats over {count} tokens")

    print("tokens after which it is most unsure")
    for row in (
        tokens.sort("entropy", "seq", "pos", descending=[True, False, False]).head(5).iter_rows(named=True)
    ):
        (shown,) = text_of(folder, [row["token"]])
        print(f"  sequence {row['seq']} position {row['pos']}: {row['entropy']:.3f} nats after {shown!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

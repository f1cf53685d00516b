"""Questions to a cache in SQL: how large is each column, which documents and tokens leave the teacher unsure?

    python examples/read_cache_duckdb.py CACHE

Needs duckdb beside what read_cache.py needs. The first two queries read the shards as they lie on disk; the
others read a table of decoded rows, which is in memory as a whole.
"""

import sys
from pathlib import Path

import duckdb
import pyarrow as pa
from read_cache import open_cache, rows, text_of

BYTES = """
    select path_in_schema as "column", sum(total_compressed_size) / any_value(tokens) as bytes_per_token
    from parquet_metadata($shards), (select count(*) as tokens from read_parquet($shards))
    group by path_in_schema order by bytes_per_token desc limit 8
"""
LONGEST = """
    select seq, doc, count(*) as tokens, count(*) filter (msk) as with_target
    from read_parquet($shards) group by seq, doc order by tokens desc, seq, doc limit 5
"""
HARDEST = """
    select seq, doc, count(*) as tokens, avg(entropy) as nats, avg(tail_mass) as outside_head
    from tokens group by seq, doc order by nats desc, seq, doc limit 5
"""
UNSURE = (
    "select seq, pos, token, choice, probability, entropy from tokens order by entropy desc, seq, pos limit 5"
)


def main(folder: Path) -> None:
    """Prints the answers."""
    database = duckdb.connect()
    shards = {"shards": open_cache(folder).shards}
    print("largest columns")
    for column, size in database.execute(BYTES, shards).fetchall():
        print(f"  {column:<6} {size:8.3f} bytes a token")
    print("longest documents")
    for seq, doc, tokens, trained in database.execute(LONGEST, shards).fetchall():
        print(f"  sequence {seq} document {doc}: {tokens} tokens, {trained} with a target")
    database.register("tokens", pa.table(rows(folder)))
    print("documents that leave the teacher most unsure")
    for seq, doc, tokens, nats, outside in database.execute(HARDEST).fetchall():
        of = f"over {tokens} tokens, {outside:.3f} outside the head"
        print(f"  sequence {seq} document {doc}: {nats:.3f} nats {of}")
    print("tokens after which it is most unsure")
    for seq, pos, token, choice, probability, nats in database.execute(UNSURE).fetchall():
        shown, guess = text_of(folder, [token, choice])
        first = f"first choice {guess!r} {probability:.3f}"
        print(f"  sequence {seq} position {pos}: {nats:.3f} nats after {shown!r}, {first}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

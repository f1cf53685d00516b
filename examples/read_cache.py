"""Reads a cache without this project: its columns through pyarrow, DuckDB or Polars, decoded with NumPy.

    python examples/read_cache.py CACHE

Needs pyarrow, numpy and safetensors; DuckDB and Polars are skipped where they are not installed. Every
column is described in schemas/FORMAT.md. Files are taken from the commit records, never from a listing;
hashes are not checked here: `pmetal-pipeline verify` does that.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Raw = dict[str, Any]  # bytes a row, whatever holds them
Decoded = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cache:
    """What the JSON files of a cache say."""

    target: dict[str, Any]
    shards: list[str]
    codebooks: list[Path | None]


def open_cache(folder: Path) -> Cache:
    """The layout and the committed shards, in order."""
    dataset = json.loads((folder / "dataset.json").read_text())
    records = [json.loads(path.read_text()) for path in (folder / "commits").glob("*.json")]
    records.sort(key=lambda record: record["shard"])
    books = [record["codebook"] and folder / "bases" / record["codebook"]["name"] for record in records]
    shards = [str(folder / "shards" / record["targets"]["name"]) for record in records]
    return Cache(dataset["target"], shards, books)


def needed_columns(target: dict[str, Any]) -> list[str]:
    """Text, mask and everything that makes log-probabilities at T=1; the tail's sketch is left alone."""
    planes = 1 + (target["vocab_size"] > 1 << 8) + (target["vocab_size"] > 1 << 16)
    names = [f"{kind}{i}" for kind in ("tok", "id") for i in range(planes)] + ["seq", "doc", "msk"]
    names += ["gap0", "gap1"] if target["k"] > 1 else []
    return names + (["top0", "top1"] if target["tail"] == "none" else ["crv0", "crv1"])


def with_pyarrow(file: str, columns: Sequence[str]) -> Raw:
    """Checks the CRC of every page."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=list(columns), page_checksum_verification=True)
    return table.to_pydict()


def with_duckdb(file: str, columns: Sequence[str]) -> Raw:
    """SQL; `select seq, count(*) from read_parquet(...) group by seq` works as well."""
    import duckdb

    query = f"select {', '.join(columns)} from read_parquet(?)"
    return duckdb.execute(query, [file]).fetchnumpy()


def with_polars(file: str, columns: Sequence[str]) -> Raw:
    """Data frames; `pl.scan_parquet` works as well."""
    import polars as pl

    return pl.read_parquet(file, columns=list(columns)).to_dict(as_series=False)


ENGINES: dict[str, Callable[[str, Sequence[str]], Raw]] = {
    "pyarrow": with_pyarrow,
    "duckdb": with_duckdb,
    "polars": with_polars,
}


def number(columns: Raw, kind: str) -> np.ndarray:
    """int64 [n, width] of the byte planes `kind`0, `kind`1, ..., low byte first."""
    planes = [name for name in sorted(columns) if name.startswith(kind) and name[len(kind) :].isdigit()]
    matrices = [
        np.frombuffer(b"".join(columns[name]), np.uint8).reshape(len(columns[name]), -1) for name in planes
    ]
    return sum((m.astype(np.int64) << 8 * i for i, m in enumerate(matrices)), np.int64(0))


def decode(columns: Raw, target: dict[str, Any], codebook: Decoded | None) -> Decoded:
    """Columns of n tokens, at T=1; where the mask is false only the text means anything.

    `token_ids`, `sequences`, `documents`, `mask` [n]; `head_ids`, `head_logprobs` [n, k]; `tail_mass` and
    `entropy` in nats [n].
    """
    vocab_size, k = target["vocab_size"], target["k"]
    order = codebook["token_order"] if codebook else np.arange(vocab_size)
    below = np.zeros((len(columns["seq"]), k))
    if k > 1:
        below[:, 1:] = np.cumsum(number(columns, "gap"), axis=1) * target["logprob_step"]
    if target["tail"] == "none":
        top, inside = -number(columns, "top")[:, 0] / 2048, np.zeros(len(below))
    else:
        curve = decode_curve(number(columns, "crv"), codebook) * target["curve_step"]
        at_one = curve[:, target["curve_nodes"].index(1.0)]
        top = -np.log(np.exp(-below).sum(axis=1) + np.exp(-below[:, -1] + at_one))
        inside = at_one - slope_at_one(curve, target)
    logprobs = top[:, None] - below
    tail = np.maximum(1 - np.exp(logprobs).sum(axis=1), 0)
    return {
        "token_ids": number(columns, "tok")[:, 0],
        "sequences": np.asarray(columns["seq"]),
        "documents": np.asarray(columns["doc"]),
        "mask": np.asarray(columns["msk"], bool),
        "head_ids": order[number(columns, "id")],
        "head_logprobs": logprobs,
        "tail_mass": tail,
        "entropy": -(np.exp(logprobs) * logprobs).sum(axis=1)
        + tail * (np.clip(inside, 0, np.log(vocab_size - k)) - np.log(np.maximum(tail, 1e-30))),
    }


def slope_at_one(curve: np.ndarray, target: dict[str, Any]) -> np.ndarray:
    """A'(1) [n] of the polynomial through the nodes: A - A' is the entropy of the tail's own distribution."""
    nodes = np.array([0.0, *target["curve_nodes"]])
    powers = np.arange(len(nodes))
    weights = np.linalg.solve(np.vander(nodes, increasing=True).T, powers)
    return weights[0] * np.log(target["vocab_size"] - target["k"]) + curve @ weights[1:]


def decode_curve(residuals: np.ndarray, codebook: Decoded | None) -> np.ndarray:
    """Steps of the tail's log-partition, int64 [n, m], each node predicted from those before it."""
    count = residuals.shape[1]
    predictor = codebook["curve_predictor"] if codebook else 65536 * np.eye(count, count + 1, dtype=int)
    if codebook is None:
        predictor[:1, :1] = 0
    steps = np.zeros_like(residuals)
    for node in range(count):
        predicted = (steps[:, :node] @ predictor[node, 1 : node + 1] + predictor[node, 0]) >> 16
        steps[:, node] = (predicted + residuals[:, node] - 128 + 32768) % 65536 - 32768
    return steps


def read_all(cache: Cache, engine: str) -> Decoded:
    """All shards through one engine, decoded."""
    from safetensors.numpy import load_file

    columns, parts = needed_columns(cache.target), []
    for file, book in zip(cache.shards, cache.codebooks, strict=True):
        codebook = load_file(book) if book else None
        parts.append(decode(ENGINES[engine](file, columns), cache.target, codebook))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rows(folder: Path) -> Decoded:
    """A table of the tokens with a target: where they stand, and how sure the teacher is of what follows."""
    found = read_all(open_cache(folder), "pyarrow")
    on = found["mask"]
    _, first, length = np.unique(found["sequences"], return_index=True, return_counts=True)
    starts = np.repeat(first, length)
    last = np.roll(found["sequences"], -1) != found["sequences"]
    return {
        "seq": found["sequences"][on],
        "pos": (np.arange(len(on)) - starts)[on],
        "doc": found["documents"][on],
        "token": found["token_ids"][on],
        "next_token": np.where(last, -1, np.roll(found["token_ids"], -1))[on],
        "choice": found["head_ids"][on, 0],
        "probability": np.exp(found["head_logprobs"][on, 0]),
        "tail_mass": found["tail_mass"][on],
        "entropy": found["entropy"][on],
    }


def text_of(folder: Path, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, by the tokenizer that lies in the cache."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return [tokenizer.decode([int(token)], skip_special_tokens=False) for token in token_ids]


def main(folder: Path) -> None:
    """Prints what each engine finds; all must find the same."""
    cache = open_cache(folder)
    first: Decoded | None = None
    for engine in ENGINES:
        if importlib.util.find_spec(engine) is None:
            print(f"{engine:<8} skipped: not installed")
            continue
        started = time.perf_counter()
        found = read_all(cache, engine)
        seconds = time.perf_counter() - started
        on = found["mask"]
        best, tail = np.exp(found["head_logprobs"][on, 0]).mean(), found["tail_mass"][on].mean()
        entropy = found["entropy"][on].mean()
        print(f"{engine:<8} {len(on):,} tokens, {on.sum():,} with a target, {seconds:.2f} s")
        print(f"{'':<8} mean probability of the first choice {best:.4f}, of all outside the head {tail:.4f}")
        print(f"{'':<8} mean entropy {entropy:.4f} nats")
        first = first or found
        assert all(np.array_equal(first[name], found[name]) for name in first), f"{engine} reads other values"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

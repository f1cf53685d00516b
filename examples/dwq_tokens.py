"""Writes the text that DWQ targets belong to, which `mlx_lm.dwq --target-dir` does not keep.

    mlx_lm.dwq --model MODEL --data-path DATA --target-dir TARGETS --targets-only
    python examples/dwq_tokens.py --model MODEL --data-path DATA --split train tokens.jsonl
    pmetal-pipeline import dwq TARGETS/train --tokens tokens.jsonl --tokenizer MODEL \\
        --teacher-name NAME --out CACHE

Give the options that `mlx_lm.dwq` was given: the same data, seed and sizes make the same batches.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.quant.dwq import load_data
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load_tokenizer


def sequences(data: Sequence[Any], *, batch_size: int, max_seq_length: int, seed: int) -> Iterator[list[int]]:
    """Token ids in the order in which `mlx_lm.dwq` has written their targets, without padding."""
    for batch, spans in iterate_batches(data, batch_size, max_seq_length, seed=seed):
        for row, (_, length) in zip(batch.tolist(), spans.tolist(), strict=True):
            yield row[:length]


def main() -> None:
    """The options and defaults are those of `mlx_lm.dwq`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-path", default="allenai/tulu-3-sft-mixture")
    parser.add_argument("--split", choices=["train", "valid"], default="train")
    parser.add_argument("--num-samples", type=int, default=2048)
    parser.add_argument("--max-seq-length", type=int, default=1025)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    np.random.seed(options.seed)  # noqa: NPY002 - what mlx_lm.dwq draws its samples with
    mx.random.seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    train, valid = load_data(tokenizer, options.data_path, options.num_samples, options.max_seq_length)
    data = train if options.split == "train" else valid
    sizes = {"batch_size": options.batch_size, "max_seq_length": options.max_seq_length}
    with options.out.open("w") as file:
        for token_ids in sequences(data, seed=options.seed, **sizes):
            file.write(json.dumps({"token_ids": token_ids}) + "\n")


if __name__ == "__main__":
    main()

"""`export --dense`: log-probabilities over the whole vocabulary of a few sequences, rebuilt from the cache.

A file a sequence, at T=1, float32 [n, V]: 4 V bytes a token. Row t is about the token after token t; rows
without a target are NaN. A bucket's mass is spread evenly over the tail, without a tail the rest is -inf.
`import dense` reads what this writes. Memory: 64 rows.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from pipeline.console import Console
from pipeline.exchange.exporting import chosen_sequences, stored_in_order
from schemas.arrays import Float32

if TYPE_CHECKING:
    from pmetal_distill.offline.batch import StoredSequence
    from pmetal_distill.offline.reader import LogitCache

DenseFormat = Literal["safetensors", "npy"]
ROWS = 64


def export_dense(
    place: Path | str, out: Path, console: Console, *, sequences: str, file_format: DenseFormat
) -> dict[str, Any]:
    """Writes chosen sequences.

    Args:
        place: the cache, a folder or URL.
        out: must be missing or empty; appears whole or not at all.
        console: where progress goes.
        sequences: "0:4", or "0,3,9".
        file_format: "safetensors" with token ids and masks inside, or "npy" with these beside.

    Raises:
        UsageError: no cache, `out` is in use, or sequences that are not there.
        CorruptionError, IncompatibleError: a damaged or unfinished cache.
    """
    from pmetal_distill.modelling.folders import new_folder, require_unused
    from pmetal_distill.offline.reader import LogitCache

    require_unused(out)
    cache = LogitCache(place)
    numbers = chosen_sequences(sequences, cache)
    tokens = 0
    total = int(cache.lengths[np.searchsorted(cache.numbers, numbers)].sum())
    write = _write_safetensors if file_format == "safetensors" else _write_npy
    with new_folder(out) as draft, console.progress("exporting", total=total, unit="tokens") as progress:
        for row in stored_in_order(cache, numbers):
            write(draft / f"sequence-{row.number:05d}", row, cache)
            tokens += len(row)
            progress.advance(len(row))
    return {
        "out": str(out),
        "sequences": len(set(numbers)),
        "tokens": tokens,
        "vocabulary": cache.spec.vocab_size,
        "tail": cache.spec.tail,
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
    }


def dense_rows(row: "StoredSequence", cache: "LogitCache") -> Iterator[Float32]:
    """log p of every token at T=1, float32 [64, V] at a time; NaN in rows without a target."""
    from pmetal_distill.offline.rebuild import reconstruct_logprobs

    basis = cache.bases[row.basis_index] if row.basis_index >= 0 else None
    for start in range(0, len(row), ROWS):
        part = slice(start, start + ROWS)
        rows = reconstruct_logprobs(row.targets[part], cache.spec, temperature=1.0, basis=basis)
        rows[~row.loss_mask[part]] = np.nan
        yield rows


def _write_safetensors(stem: Path, row: "StoredSequence", cache: "LogitCache") -> None:
    count, vocab_size = len(row), cache.spec.vocab_size
    small = {"token_ids": row.token_ids, "documents": row.documents, "loss_mask": row.loss_mask}
    dtypes = {"token_ids": "I32", "documents": "I32", "loss_mask": "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"temperature": "1", "tail": cache.spec.tail}}
    offset = 4 * count * vocab_size
    header["logprobs"] = {"dtype": "F32", "shape": [count, vocab_size], "data_offsets": [0, offset]}
    for name, array in small.items():
        stop = offset + array.nbytes
        header[name] = {"dtype": dtypes[name], "shape": [count], "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with stem.with_suffix(".safetensors").open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        _write_rows(file, row, cache)
        for array in small.values():
            file.write(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _write_npy(stem: Path, row: "StoredSequence", cache: "LogitCache") -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(row), cache.spec.vocab_size)}
    with stem.with_suffix(".logprobs.npy").open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        _write_rows(file, row, cache)
    for name, array in (("token_ids", row.token_ids), ("loss_mask", row.loss_mask)):
        np.save(stem.with_suffix(f".{name}.npy"), array)


def _write_rows(file: BinaryIO, row: "StoredSequence", cache: "LogitCache") -> None:
    for rows in dense_rows(row, cache):
        file.write(rows.astype("<f4", copy=False).tobytes())

"""`export`: a cache to Parquet that needs no decoder, a row a sequence, for `datasets`, DuckDB or pandas.

    input_ids list<int32>, documents list<int32>, loss_mask list<bool>,
    head_ids list<list<int32>>, head_logprobs list<list<float32>>, tail_mass list<float32>

Row t of a list is about the token after token t; where loss_mask is false the inner lists are empty and the
mass is null. Streams: memory is a few row groups of about 30 thousand tokens.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.console import Console, Progress
from schemas.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from pmetal_distill.offline.batch import StoredSequence
    from pmetal_distill.offline.reader import LogitCache

FILE_BYTES = 256 << 20
GROUP_TOKENS = 1 << 15
SEQUENCES_AT_ONCE = 8

CARD = """\
---
tags: [distillation, logits]
configs:
- config_name: default
  data_files: data/*.parquet
---
What a teacher says about every token of a text: {teacher}, exported from a pmetal-distill cache.

| column | |
|---|---|
| `input_ids` | the tokens of a sequence |
| `documents` | number of the document each token belongs to; attention stays inside it |
| `loss_mask` | true where there is a target |
| `head_ids` | the {k} most likely next tokens, best first; empty where there is no target |
| `head_logprobs` | their log-probabilities at temperature 1, natural log |
| `tail_mass` | probability of all other tokens together at temperature 1 |

Entry t is about the token after `input_ids[t]`. {lost}

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder", split="train")
```

or, without it, `pyarrow.parquet.read_table("path/to/this/folder/data")`.

Vocabulary {vocab_size}; tokenizer in `tokenizer/`. Made from: {fingerprint}
"""


def export_lists(place: Path | str, out: Path, console: Console) -> dict[str, Any]:
    """Exports a whole cache.

    Args:
        place: the cache, complete; a folder or URL.
        out: must be missing or empty; appears whole or not at all.
        console: where progress goes.

    Returns:
        files, sequences, tokens and bytes written.

    Raises:
        UsageError: no cache, or `out` is in use.
        CorruptionError, IncompatibleError: a damaged or unfinished cache.
    """
    from pmetal_distill.modelling.folders import new_folder, require_unused
    from pmetal_distill.offline.reader import LogitCache

    require_unused(out)
    cache = LogitCache(place)
    with new_folder(out) as draft:
        with console.progress("exporting", total=cache.num_tokens, unit="tokens") as progress:
            (draft / "data").mkdir()
            files = write_files(cache, draft / "data", progress)
        copy_tokenizer(cache, draft)
        (draft / "README.md").write_text(card(cache), encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in files)
    return {
        "out": str(out),
        "files": len(files),
        "sequences": cache.num_sequences,
        "tokens": cache.num_tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / cache.num_tokens,
    }


def write_files(
    cache: "LogitCache",
    folder: Path,
    progress: Progress,
    *,
    file_bytes: int = FILE_BYTES,
    group_tokens: int = GROUP_TOKENS,
) -> list[Path]:
    """Parquet files of about `file_bytes`, row groups of `group_tokens`, in the order of the sequences."""
    import pyarrow.parquet as pq

    files: list[Path] = []
    writer: Any = None
    try:
        for table in _row_groups(cache, progress, group_tokens):
            if writer is None:
                files.append(folder / f"data-{len(files):05d}.parquet")
                writer = pq.ParquetWriter(files[-1], table.schema, compression="zstd", compression_level=3)
            writer.write_table(table)
            if files[-1].stat().st_size >= file_bytes:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    return files


def _row_groups(cache: "LogitCache", progress: Progress, group_tokens: int) -> Iterator["pa.Table"]:
    """Tables of whole sequences that reach `group_tokens` tokens."""
    import pyarrow as pa

    pending: list[pa.Table] = []
    tokens = 0
    for row in stored_in_order(cache):
        pending.append(as_table(row))
        tokens += len(row)
        progress.advance(len(row))
        if tokens >= group_tokens:
            yield pa.concat_tables(pending)
            pending, tokens = [], 0
    if pending:
        yield pa.concat_tables(pending)


def as_table(row: "StoredSequence") -> "pa.Table":
    """A row of lists for a sequence."""
    import pyarrow as pa

    mask, targets = row.loss_mask, row.targets
    width = np.where(mask, targets.k, 0)
    columns = {
        "input_ids": pa.array(row.token_ids),
        "documents": pa.array(row.documents),
        "loss_mask": pa.array(mask),
        "head_ids": _lists(pa.array(targets.head_ids[mask].ravel()), width),
        "head_logprobs": _lists(pa.array(targets.head_logprobs[mask].ravel()), width),
        "tail_mass": pa.array(tail_mass(targets.head_logprobs), mask=~mask),
    }
    return pa.table({name: _lists(values, [len(mask)]) for name, values in columns.items()})


def tail_mass(head_logprobs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Probability outside the head at T=1, float32 [n], of log-probabilities [n, k]."""
    head = np.exp(head_logprobs.astype(np.float64)).sum(axis=1)
    return np.asarray(np.maximum(1 - head, 0), np.float32)


def card(cache: "LogitCache") -> str:
    """README.md of an export, a data set card."""
    dataset = cache.dataset
    tail = cache.spec.tail
    lost = dataset.meta.get("lost")
    remark = (
        f"Not in it: {lost}." if lost else f"The cache's tail was `{tail}`; only its mass at T=1 is here."
    )
    teacher = Path(dataset.meta.get("teacher", "a teacher"))
    return CARD.format(
        teacher=(teacher.name if teacher.is_absolute() else str(teacher)).replace("\n", " "),
        k=cache.spec.k,
        lost=remark,
        vocab_size=dataset.target.vocab_size,
        fingerprint="`" + json.dumps(dataset.fingerprint, sort_keys=True) + "`",
    )


def copy_tokenizer(cache: "LogitCache", folder: Path) -> None:
    """The teacher's tokenizer files, after their hashes are checked."""
    source = cache.tokenizer_path
    (folder / "tokenizer").mkdir()
    for ref in cache.dataset.tokenizer:
        (folder / "tokenizer" / ref.name).write_bytes((source / ref.name).read_bytes())


def chosen_sequences(text: str, cache: "LogitCache") -> list[int]:
    """Sequence numbers of a range as "0:4", or of a list as "0,3,9".

    Raises:
        UsageError: neither of them, or numbers that the cache does not have.
    """
    try:
        if ":" in text:
            start, stop = (int(part) if part else None for part in text.split(":"))
            numbers: list[int] = cache.numbers[slice(start, stop)].tolist()
        else:
            numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--sequences: must be as 0:4 or 0,3,9, found {text!r}") from error
    if strange := sorted(set(numbers) - set(cache.numbers.tolist())):
        raise UsageError(
            f"--sequences: must be among the {cache.num_sequences} of the cache, found {strange[0]}"
        )
    if not numbers:
        raise UsageError(f"--sequences: must name at least one, found {text!r}")
    return numbers


def stored_in_order(cache: "LogitCache", numbers: Sequence[int] | None = None) -> Iterator["StoredSequence"]:
    """Sequences by number, all or some; each row group of the cache is decoded once."""
    from pmetal_distill.offline.batch import PADDING_DOCUMENT, StoredSequence

    options: dict[str, Any] = {"batch_size": SEQUENCES_AT_ONCE, "seed": 0, "epochs": 1, "shuffle": False}
    with cache.batches(**options, window=1, prefetch=0, pad_multiple=1, subset=numbers) as batches:
        for batch in batches:
            lengths = (batch.documents != PADDING_DOCUMENT).sum(axis=1)
            for i, length in enumerate(lengths.tolist()):
                yield StoredSequence(
                    int(batch.numbers[i]),
                    batch.token_ids[i, :length],
                    batch.documents[i, :length],
                    batch.loss_mask[i, :length],
                    batch.targets[i, :length],
                    int(batch.basis_index[i]),
                )


def _lists(values: Any, lengths: Any) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)

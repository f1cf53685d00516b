"""DistillKit's logit data sets: Parquet, or Arrow as `datasets` saves it, one sequence a row.

Row t of the lists is what the teacher said at token t about the next one. There are as many rows as tokens
in packed data, where the last row of a document is about a token that was cut off, and one fewer in data
that is not packed. `attention_mask` numbers the documents of a packed sequence from 1; 0 is padding.
`labels`, where there are any, say which tokens are trained.

References:
    DistillKit, distillkit/sample_common.py (schemas), pack_logits.py, sample_logits_vllm.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.exchange.distillkit_codec import (
    FILE,
    Legacy,
    Quantization,
    index_bits,
    read_config,
    unpack_bytes,
    unpack_words,
)
from pipeline.exchange.sequences import Heads, Source, SourceSequence, sorted_heads, token_array
from schemas.arrays import Bool, Int32
from schemas.errors import DataError, UsageError

NEW = ("compressed_logprobs", "bytepacked_indices")
OLD = ("packed_indices", "exact_values", "coeffs")
PLAIN = ("token_ids", "top_values")
ASIDE = ("attention_mask", "labels")
ROWS_AT_ONCE = 4
LOSSY_TOLERANCE = 0.05

Matrix = npt.NDArray[Any]


@dataclass(slots=True, eq=False)
class DistillKitSource(Source):
    """A DistillKit data set with its compression."""

    config: Quantization | Legacy | None = None

    def sequences(self) -> Iterator[SourceSequence]:
        self.dropped.clear()
        for file in self.files:
            row = 0
            for batch in _batches(file):
                for i in range(batch.num_rows):
                    row += 1
                    yield self._sequence(batch.slice(i, 1), f"{file}:{row}")

    def _sequence(self, row: Any, where: str) -> SourceSequence:
        names = row.schema.names
        token_ids = token_array(_flat(row, "input_ids", where), where, "'input_ids'")
        documents = self._documents(row, len(token_ids), where)
        length = len(documents)
        token_ids = token_ids[:length]
        heads = self._heads(row, names, where)
        rows = len(heads.ids)
        if not length - 1 <= rows <= len(_flat(row, "input_ids", where)):
            raise DataError(
                f"{where}: lists must have a row a token, or one fewer, found {rows} for {length} tokens; "
                "see that the data set is whole"
            )
        heads = _fitted(heads, length)
        mask = (heads.counts > 0) & self._labelled(row, documents, where)
        return SourceSequence(where, token_ids, documents, mask, heads)

    def _heads(self, row: Any, names: list[str], where: str) -> Heads:
        if set(PLAIN) <= set(names):
            return sorted_heads(_matrix(row, PLAIN[0], where), _matrix(row, PLAIN[1], where), where)
        if set(NEW) <= set(names) and isinstance(self.config, Quantization):
            return self._new(_matrix(row, NEW[0], where), _matrix(row, NEW[1], where), self.config, where)
        if set(OLD) <= set(names) and isinstance(self.config, Legacy):
            return self._old([_matrix(row, name, where) for name in OLD], self.config, where)
        raise DataError(
            f"{where}: must have {NEW} with a logprob_compressor, or {OLD} with a legacy_logit_compression, "
            f"found {names[:8]}; give the configuration that the data set was made with"
        )

    def _new(self, packed: Matrix, indices: Matrix, config: Quantization, where: str) -> Heads:
        bits = index_bits(config.d)
        widths = (packed.shape[1], indices.shape[1])
        wanted = (config.num_bytes, -(-bits * config.k // 8))
        if widths != wanted or len(packed) != len(indices):
            raise _not_fitting(where, widths, wanted)
        ids = unpack_bytes(_as_bytes(indices, where), bits, config.k)
        return sorted_heads(ids, config.logprobs(_as_bytes(packed, where)), where)

    def _old(self, columns: list[Matrix], config: Legacy, where: str) -> Heads:
        packed, exact, coefficients = columns
        bits = index_bits(config.vocab_size)
        widths = (packed.shape[1], exact.shape[1], coefficients.shape[1])
        wanted = (-(-config.k // (64 // bits)), config.exact_k, config.num_terms)
        if widths != wanted or len({len(column) for column in columns}) != 1:
            raise _not_fitting(where, widths, wanted)
        values = config.values(exact, coefficients).astype(np.float64)
        values -= np.logaddexp.reduce(values, axis=1, keepdims=True)
        return sorted_heads(unpack_words(packed, bits, config.k), values, where)

    def _documents(self, row: Any, length: int, where: str) -> Int32:
        """Documents numbered from 0 of the tokens that are no padding."""
        if "attention_mask" not in row.schema.names:
            return np.zeros(length, np.int32)
        mask = np.asarray(_flat(row, "attention_mask", where))
        if len(mask) < length:
            raise DataError(
                f"{where}: 'attention_mask' must cover {length} tokens, found {len(mask)}; correct the row"
            )
        kept = np.trim_zeros(mask[:length], "b")
        if len(kept) == 0 or (kept <= 0).any():
            raise DataError(
                f"{where}: 'attention_mask' must be above 0 except at the end, found other values"
            )
        return np.concatenate([[0], np.cumsum(np.diff(kept) != 0)]).astype(np.int32)

    def _labelled(self, row: Any, documents: Int32, where: str) -> Bool:
        """Rows whose next token is trained; the last of a document goes with its own token."""
        trained = np.ones(len(documents), np.bool_)
        if "labels" not in row.schema.names:
            return trained
        labels = np.asarray(_flat(row, "labels", where))
        if len(labels) < len(documents):
            raise DataError(f"{where}: 'labels' must cover {len(documents)} tokens, found {len(labels)}")
        own = labels[: len(documents)] >= 0
        inside = documents[1:] == documents[:-1]
        trained[:-1] = np.where(inside, own[1:], own[:-1])
        trained[-1] = own[-1]
        return trained


def open_distillkit(source: Path, config: Path | None) -> DistillKitSource:
    """A DistillKit data set.

    Args:
        source: a Parquet or Arrow file, or a folder of them.
        config: YAML of the compression; the folder's own if None.

    Raises:
        DataError: no data there.
        UsageError: no configuration, or not one.
    """
    files = _data_files(source)
    if config is None and (source / FILE).is_file():
        config = source / FILE
    if config is None:
        if set(PLAIN) <= set(_names(files[0])):
            return DistillKitSource(files)
        raise UsageError(
            f"{source}: must have {FILE}, found none; give the compression with --compression-config (the "
            "data set's page or training configuration shows it)"
        )
    codec = read_config(config)
    if isinstance(codec, Legacy):
        return DistillKitSource(files, mass_known=False, config=codec)
    tolerance = 1e-3 if codec.exact else LOSSY_TOLERANCE
    return DistillKitSource(files, tolerance=tolerance, config=codec)


def _data_files(source: Path) -> tuple[Path, ...]:
    listed = _saved_order(source / "state.json")
    found = [source] if source.is_file() else listed or sorted(source.rglob("*"))
    files = tuple(f for f in found if f.is_file() and f.suffix in (".parquet", ".arrow"))
    if not files:
        raise DataError(f"{source}: must hold .parquet or .arrow files, found none; check the path")
    return files


def _saved_order(state: Path) -> list[Path]:
    """The files of a data set in the order that `datasets.save_to_disk` wrote down."""
    if not state.is_file():
        return []
    try:
        listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        return [state.parent / Path(entry["filename"]).name for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state}: must list the data files, found: {error!r}; save the data set again"
        ) from error


def _batches(file: Path) -> Iterator[Any]:
    """Batches of rows, their offsets checked: a file may lie about them."""
    import pyarrow as pa

    try:
        for batch in _read_batches(file):
            batch.validate(full=True)
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: must be readable, found: {error}; copy it again") from error


def _read_batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.suffix == ".parquet":
        with pq.ParquetFile(file, memory_map=False) as parquet:
            known = {"input_ids", *NEW, *OLD, *PLAIN, *ASIDE}
            wanted = [name for name in parquet.schema_arrow.names if name in known]
            yield from parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted, use_threads=False)
    else:
        with pa.OSFile(str(file)) as stream:
            yield from pa.ipc.open_stream(stream)


def _names(file: Path) -> list[str]:
    return next((list(batch.schema.names) for batch in _batches(file)), [])


def _fitted(heads: Heads, length: int) -> Heads:
    """The first `length` rows; a missing last one is empty."""
    if len(heads.ids) >= length:
        return Heads(heads.ids[:length], heads.logprobs[:length])
    width = heads.ids.shape[1]
    ids = np.concatenate([heads.ids, np.zeros((1, width), np.int32)])
    return Heads(ids, np.concatenate([heads.logprobs, np.full((1, width), -np.inf, np.float32)]))


def _as_bytes(values: Matrix, where: str) -> npt.NDArray[np.uint8]:
    if values.dtype.kind not in "iu" or (values.size and not 0 <= values.min() <= values.max() <= 255):
        raise DataError(f"{where}: packed lists must hold bytes, found other values; copy the data again")
    return values.astype(np.uint8)


def _not_fitting(where: str, found: object, wanted: object) -> DataError:
    return DataError(
        f"{where}: rows must have widths {wanted} as the compression's configuration says, found {found}; "
        "give the configuration that the data set was made with"
    )


def _flat(row: Any, name: str, where: str) -> Matrix:
    """The list of integers in the only row of a column."""
    return _numbers(_inner(row, name, where), f"{where}: '{name}'")


def _matrix(row: Any, name: str, where: str) -> Matrix:
    """The list of equally long lists in the only row of a column, [n, width]."""
    outer = _inner(row, name, where)
    what = f"{where}: '{name}'"
    widths = np.diff(np.asarray(_checked(lambda: outer.offsets, what)))
    if outer.null_count or len(set(widths.tolist())) > 1:
        raise DataError(f"{what} must be lists of one length, found {sorted(set(widths.tolist()))[:5]}")
    values = _numbers(outer.flatten(), what)
    return values.reshape(len(outer), int(widths[0]) if len(widths) else 0)


def _inner(row: Any, name: str, where: str) -> Any:
    if name not in row.schema.names:
        raise DataError(f"{where}: must have a column '{name}', found {row.schema.names[:8]}")
    column = row.column(name)
    if column.null_count:
        raise DataError(f"{where}: '{name}' must have a value, found null; leave the row out")
    return _checked(column.flatten, f"{where}: '{name}'")


def _checked(read: Callable[[], Any] | Any, what: str) -> Any:
    try:
        return read()
    except AttributeError as error:
        raise DataError(
            f"{what} must be a list, found another type; see that the columns are DistillKit's"
        ) from error


def _numbers(array: Any, what: str) -> Matrix:
    import pyarrow as pa

    if array.null_count or not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        raise DataError(f"{what} must be numbers, found {array.type} with {array.null_count} nulls")
    return np.asarray(array.to_numpy(zero_copy_only=False))

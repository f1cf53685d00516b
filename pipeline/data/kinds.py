"""Which kind each document of packed data is of: what a column says, or the name of its file.

Reads the files a second time for the column, so that nothing of it travels through tokenizing and packing.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.documents import describe, place
from pipeline.data.packed import PackedDataset
from pipeline.data.readers import PARQUET_BATCH_ROWS, RECORDS, suffix_of
from pipeline.data.records import read_records
from schemas.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class DocumentKinds:
    """Kinds of documents.

    Attributes:
        names: in the order of their first document.
        of_document: int32 [num_documents], index into `names`.
    """

    names: tuple[str, ...]
    of_document: NDArray[np.int32]

    @staticmethod
    def of(values: Iterable[str]) -> "DocumentKinds":
        """The kinds of documents whose values are given in order."""
        numbers: dict[str, int] = {}
        found = [numbers.setdefault(value, len(numbers)) for value in values]
        return DocumentKinds(tuple(numbers), np.array(found, np.int32))


def document_kinds(data: PackedDataset, *, feature: str | None = None) -> DocumentKinds | None:
    """The kind of every document.

    Args:
        data: packed, of files that are still there.
        feature: column that names the kind; None for the names of the files.

    Returns:
        None without a column where all documents come from one file.

    Raises:
        DataError: a record without the column, a value that is no word or number, or a file without columns.
    """
    if feature is None:
        if len(data.sources) == 1:
            return None
        parent = os.path.commonpath([str(Path(source).parent) for source in data.sources])
        names = [os.path.relpath(source, parent) for source in data.sources]
        return DocumentKinds.of(names[source] for source in data.document_sources)
    values: dict[tuple[int, int], str] = {}
    for number, source in enumerate(data.sources):
        wanted = set(data.document_lines[data.document_sources == number].tolist())
        for line, value in _column(Path(source), feature):
            if line in wanted:
                values[number, line] = _word(value, feature, place(source, line))
    places = zip(data.document_sources.tolist(), data.document_lines.tolist(), strict=True)
    return DocumentKinds.of(values[found] for found in places)


def _column(file: Path, feature: str) -> Iterator[tuple[int, object]]:
    """(line, value) of every record; None where the record lacks the column."""
    suffix = suffix_of(file)
    if suffix in (".txt", ".txt.gz"):
        raise DataError(f"{file}: a .txt file has no column '{feature}'; leave out --kind-feature")
    if suffix in RECORDS:
        for line, record in read_records(file, suffix):
            yield line, record.get(feature)
        return
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        if feature not in parquet.schema_arrow.names:
            names = ", ".join(map(repr, parquet.schema_arrow.names))
            raise DataError(f"{file}: must have the column '{feature}', found {names}; name one of them")
        row = 0
        for batch in parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[feature]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield row, value


def _word(value: object, feature: str, where: str) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{where}: '{feature}' must be a string or a whole number, found {describe(value)}; correct it "
        "or name another column"
    )

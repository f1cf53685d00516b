"""Reads documents from JSON lines, JSON, CSV, Parquet and text files or folders of them.

Streams: the memory is one line (at most `MAX_LINE_BYTES`), one block of Parquet rows, or one `.txt` or
`.json` file. Compressed input is decompressed in steps whose output is bounded even for hostile files.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.documents import CONVERSATIONS, SYSTEM, Document, FieldNames, place, to_document
from pipeline.data.lines import MAX_LINE_BYTES, read_whole
from pipeline.data.records import read_records
from pmetal_distill.plain_files import check_lengths, is_device
from schemas.errors import DataError

RECORDS = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz")
SUFFIXES = (*RECORDS, ".parquet", ".txt", ".txt.gz")
# Files about a data set that lie beside it; with a known extension they are data.
ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing", "copying")
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "valid": ("valid", "validation"),
    "test": ("test",),
}
PARQUET_BATCH_ROWS = 256


def load_documents(
    path: str | Path, *, split: str = "train", fields: FieldNames | None = None
) -> Iterator[Document]:
    """Streams the documents of a file or folder, in an order that depends on the names and contents alone.

    Args:
        path: a file; a folder with `train`, `valid` and `test` files, as `mlx_lm.lora --data` takes it; or
            any other folder, all of whose files are read, to any depth, in the order of their names.
        split: `train`, `valid` or `test`. A single file and a plain folder have only `train`.
        fields: the names of the columns; mlx-lm's default names if None.

    Raises:
        DataError: at once for what is wrong with the path, while iterating for what is wrong inside a file.
    """
    files = data_files(path, split=split)
    return _at_least_one(_read_files(files, fields or FieldNames()), where=str(path))


def data_files(path: str | Path, *, split: str = "train") -> tuple[Path, ...]:
    """The files that `load_documents` reads, in its order.

    Raises:
        DataError: nothing there, an unknown extension, or no such split.
    """
    if split not in SPLITS:
        raise DataError(f"split: must be one of {', '.join(SPLITS)}, found '{split}'; choose one of them")
    root = Path(path)
    if is_device(root):
        raise DataError(f"{root}: must be a file or folder, found a pipe or device; write it to a file first")
    if not root.exists():
        raise DataError(
            f"{root}: must be a file or folder of training text, found nothing there; check the path "
            "(a dataset of the hub: download its Parquet files first)"
        )
    files = [root] if root.is_file() else _split_files(root, split)
    if not files:
        if split == "train":
            files = [] if available_splits(root) else _all_files(root)
        if not files:
            raise DataError(_no_files(root, split))
    elif root.is_file() and split != "train":
        raise DataError(_no_files(root, split))
    for file in files:
        suffix_of(file)
    return tuple(files)


def available_splits(path: str | Path) -> tuple[str, ...]:
    """Which of `train`, `valid` and `test` a folder has; empty for a file and for a plain folder of files."""
    root = Path(path)
    return tuple(split for split in SPLITS if root.is_dir() and _split_files(root, split))


def suffix_of(file: Path) -> str:
    """The file's known extension.

    Raises:
        DataError: it has another one.
    """
    for suffix in SUFFIXES:
        if file.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"{file}: the extension must be one of {', '.join(SUFFIXES)}, found '{file.suffix or 'none'}'; "
        "convert the file or move it out of the folder"
    )


def _split_files(root: Path, split: str) -> list[Path]:
    """`train.jsonl`, or the pieces `train-00000-of-00004.parquet`."""
    found = []
    for file in sorted(root.iterdir()):
        suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), None)
        if suffix is None or not file.is_file():
            continue
        stem = file.name[: -len(suffix)]
        if any(stem == name or stem.startswith(f"{name}-") for name in SPLITS[split]):
            found.append(file)
    return found


def skipped_files(path: str | Path) -> tuple[Path, ...]:
    """The files of a plain folder that `load_documents` leaves out: those that tell about the others."""
    root = Path(path)
    if not root.is_dir() or available_splits(root):
        return ()
    return tuple(file for file in _visible_files(root) if _is_about(file))


def _all_files(root: Path) -> list[Path]:
    return [file for file in _visible_files(root) if not _is_about(file)]


def _is_about(file: Path) -> bool:
    name = file.name.lower()
    return name.split(".")[0] in ABOUT and not name.endswith(SUFFIXES)


def _visible_files(root: Path) -> list[Path]:
    visible = (
        file
        for file in root.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    return sorted(visible, key=lambda file: file.relative_to(root).as_posix())


def _no_files(root: Path, split: str) -> str:
    if root.is_file():
        return f"{root}: a single file has no '{split}' split; leave --split out, or give a folder with it"
    has = ", ".join(available_splits(root))
    if has:
        return f"{root}: must have a '{split}' file, found only {has}; add {split}.jsonl"
    if split != "train":
        return f"{root}: a plain folder of files has no '{split}' split; add {split}.jsonl and train.jsonl"
    return f"{root}: must hold {', '.join(SUFFIXES)} files, found none; check the path"


def _read_files(files: Iterable[Path], fields: FieldNames) -> Iterator[Document]:
    for file in files:
        suffix = suffix_of(file)
        if suffix in RECORDS:
            found = _from_records(file, suffix, fields)
        else:
            found = _read_parquet(file, fields) if suffix == ".parquet" else _read_txt(file)
        try:
            yield from _one_kind(_at_least_one(found, where=str(file)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{file}: must be readable, found: {reason}; check the file") from error


def _one_kind(documents: Iterator[Document]) -> Iterator[Document]:
    first: Document | None = None
    for document in documents:
        first = first or document
        if document.kind != first.kind:
            raise DataError(
                f"{document.where}: all records of a file must have one shape, found '{document.kind}' after "
                f"'{first.kind}' in line {first.line}; put them into files of their own"
            )
        yield document


def _at_least_one(documents: Iterator[Document], *, where: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError(f"{where}: must hold at least one document, found none; give other data")


def _from_records(file: Path, suffix: str, fields: FieldNames) -> Iterator[Document]:
    for line, record in read_records(file, suffix):
        yield to_document(record, source=str(file), line=line, fields=fields)


def _read_txt(file: Path) -> Iterator[Document]:
    data = read_whole(file) if file.name.lower().endswith(".gz") else file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{place(str(file), line)}: must be UTF-8, found byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert the file"
        ) from error
    if text.strip():
        yield Document(kind="text", source=str(file), text=text)


def _read_parquet(file: Path, fields: FieldNames) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise DataError(f"{file}: must be a Parquet file, found: {error}; write it again") from error
    with parquet:
        names = parquet.schema_arrow.names
        columns = [name for name in fields.columns() if name in names]
        if not columns:
            raise DataError(
                f"{file}: must have the columns {fields.choices()}, found {', '.join(map(repr, names))}; "
                "rename them or name the columns"
            )
        row = 0
        batches = parquet.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns)
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.to_pylist()
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise DataError(
                    f"{place(str(file), row + 1)}: must be readable, found: {error}; write it again"
                ) from error
            if batch is None:
                return
            for record in records:
                row += 1
                check_lengths(record, where=place(str(file), row), most=MAX_LINE_BYTES)
                yield to_document(_without_nulls(record, fields), source=str(file), line=row, fields=fields)


def _without_nulls(record: dict[str, Any], fields: FieldNames) -> dict[str, Any]:
    """Drops the nulls that Parquet's structs add to chats: a key that a message never had stays absent."""
    nested = (fields.messages, fields.tools, CONVERSATIONS, SYSTEM)
    return {
        key: _prune(value) if key in nested else value
        for key, value in record.items()
        if value is not None or key not in nested
    }


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_prune(item) for item in value]
    return value

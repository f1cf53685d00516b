"""Page headers of a Parquet column chunk, read and bounded before Parquet's own reader believes them.

That reader allocates what a header promises and skips a checksum that is not there. Costs a read of at most
1 KiB a page and about 14 microseconds.
"""

from dataclasses import dataclass
from typing import BinaryIO

import pyarrow.parquet as pq

from pmetal_distill.offline.thrift import I32, I64, CompactReader, Shape, Value
from schemas.errors import CorruptionError

MAX_HEADER_BYTES = 1 << 10
_DATA_PAGE = 0
_PLAIN, _DELTA = 0, 5
_TYPE, _UNPACKED, _PACKED, _CRC, _DATA_HEADER = 1, 2, 3, 4, 5
_NUM_VALUES, _ENCODING = 1, 2
_COUNTS: Shape = {3: I64, 4: I64}  # of statistics; pyarrow writes them without a field
_DATA: Shape = {_NUM_VALUES: I32, _ENCODING: I32, 3: I32, 4: I32, 5: _COUNTS}
_HEADER: Shape = {_TYPE: I32, _UNPACKED: I32, _PACKED: I32, _CRC: I32, _DATA_HEADER: _DATA}


@dataclass(frozen=True, slots=True)
class Page:
    """One page as its header describes it.

    Attributes:
        offset: of the header in the file.
        header_bytes, packed_bytes, unpacked_bytes: sizes of the header and of the data before and after
            decompression.
        num_values: rows.
        encoding: Parquet's number of it.
        crc: of the data, or None.
    """

    offset: int
    header_bytes: int
    packed_bytes: int
    unpacked_bytes: int
    num_values: int
    encoding: int
    crc: int | None


def check_pages(handle: BinaryIO, meta: pq.FileMetaData, group: int, column: int, *, width: int) -> None:
    """Whether the pages of a column chunk are what the format allows, before any of them is unpacked.

    Args:
        handle: the file.
        meta: its footer, whose structure was checked.
        group, column: which chunk.
        width: bytes of a value, 0 for an integer or truth value.

    Raises:
        CorruptionError: a page is no data page, leaves the chunk, has no CRC, promises other rows or unpacks
            to more than its rows take.
    """
    chunk = meta.row_group(group).column(column)
    where = f"row group {group} column {chunk.path_in_schema}"
    allowed = (_PLAIN,) if width else (_PLAIN, _DELTA)
    rows, left = 0, chunk.num_values
    for page in read_pages(handle, chunk.data_page_offset, chunk.total_compressed_size, where=where):
        most = page.num_values * (width or 8) + MAX_HEADER_BYTES
        if page.crc is None or page.encoding not in allowed or not 0 < page.num_values <= left - rows:
            raise CorruptionError(f"{where}: pages must have a CRC, rows and a plain encoding, found {page}")
        if page.unpacked_bytes > most or (width and page.unpacked_bytes != page.num_values * width):
            raise CorruptionError(f"{where}: a page must unpack to at most {most} bytes, found {page}")
        rows += page.num_values
    if rows != chunk.num_values:
        raise CorruptionError(f"{where}: pages must hold {chunk.num_values} rows, found {rows}")


def read_pages(handle: BinaryIO, start: int, num_bytes: int, *, where: str) -> list[Page]:
    """The pages in a range of a file, which they must fill.

    Raises:
        CorruptionError: headers that cannot be read, or sizes that leave the range.
    """
    pages, at, end = [], start, start + num_bytes
    if not 0 < start < end <= handle.seek(0, 2):
        raise CorruptionError(f"{where}: must lie inside the file, found bytes {start} to {end}")
    while at < end:
        handle.seek(at)
        try:
            page = _page(at, handle.read(min(MAX_HEADER_BYTES, end - at)))
        except (IndexError, ValueError, KeyError) as error:
            raise CorruptionError(
                f"{where}: page header at byte {at} must be readable, found {error!r}"
            ) from error
        at += page.header_bytes + page.packed_bytes
        if at > end:
            raise CorruptionError(f"{where}: a page must end at byte {end}, found {at}")
        pages.append(page)
    return pages


def _page(offset: int, data: bytes) -> Page:
    reader = CompactReader(data)
    fields = reader.struct(_HEADER)
    header = fields[_DATA_HEADER]
    assert isinstance(header, dict)
    if fields[_TYPE] != _DATA_PAGE or not header.keys() >= {_NUM_VALUES, _ENCODING, 3, 4}:
        raise ValueError(f"page type {fields[_TYPE]!r}")
    packed, unpacked, values = (_size(v) for v in (fields[_PACKED], fields[_UNPACKED], header[_NUM_VALUES]))
    encoding, crc = header[_ENCODING], fields.get(_CRC)
    assert isinstance(encoding, int)
    assert crc is None or isinstance(crc, int)
    return Page(offset, reader.at, packed, unpacked, values, encoding, crc)


def _size(value: Value) -> int:
    assert isinstance(value, int)
    if value < 0:
        raise ValueError(f"a size of {value}")
    return value

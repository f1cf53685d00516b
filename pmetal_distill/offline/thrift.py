"""Thrift's compact protocol, bounded: what Parquet's footers and page headers are written in.

A structure is read as a dict of its fields by number. Costs about 1 microsecond a field, and at the worst 100
bytes of memory a byte.
"""

Value = int | bytes | list["Value"] | dict[int, "Value"]
Struct = dict[int, Value]

MAX_DEPTH = 8
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 12


class CompactReader:
    """Reads structures one after another from `data`.

    Every method raises ValueError or IndexError on what is no such structure, on a field given twice, and on
    more than `MAX_DEPTH` levels.
    """

    __slots__ = ("_data", "at")

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, depth: int = 0) -> Struct:
        """The fields of the next structure."""
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        fields: Struct = {}
        number = 0
        while (field := self.field(number)) is not None:
            number, kind = field
            if number in fields:
                raise ValueError(f"field {number} twice")
            fields[number] = int(kind == _TRUE) if kind in (_TRUE, _FALSE) else self.value(kind, depth)
        return fields

    def field(self, number: int) -> tuple[int, int] | None:
        """Number and kind of the field after field `number` (0 before the first); None at the end."""
        head = self._data[self.at]
        self.at += 1
        if head == 0:
            return None
        return (number + (head >> 4) if head >> 4 else self._signed()), head & 15

    def list_head(self) -> tuple[int, int]:
        """Number and kind of the items of a list, which follow."""
        head = self._take(1)[0]
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if size > len(self._data) - self.at:
            raise ValueError(f"a list of {size} items")
        return size, head & 15

    def value(self, kind: int, depth: int = 0) -> Value:
        """A value of this kind, with all that is in it."""
        if kind in _INTEGERS:
            return self._signed()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in _LISTS:
            if depth >= MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} levels")
            size, items = self.list_head()
            return [self.value(items, depth + 1) for _ in range(size)]
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._take(1)[0]
        if kind == _DOUBLE:
            return self._take(8)
        raise ValueError(f"a value of kind {kind}")

    def _take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self._data):
            raise IndexError("bytes beyond the end")
        return self._data[start : self.at]

    def _varint(self) -> int:
        value, data = 0, self._data
        for shift in range(0, 70, 7):
            byte = data[self.at]
            self.at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than 70 bits")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

"""Thrift's compact protocol, read by a given shape: what Parquet's footers and page headers are written in.

What the shape does not name is refused, and so is a field of another kind or size: other readers skip those,
and would then see something else than this one. Costs about 1 microsecond a field.
"""

from dataclasses import dataclass

I16, I32, I64, BINARY = 4, 5, 6, 8
_LIST, _STRUCT = 9, 12
_BITS = {I16: 16, I32: 32, I64: 64}


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of items of one kind."""

    item: "Kind"


Shape = dict[int, "Kind"]
Kind = int | ListOf | Shape
Value = int | bytes | list["Value"] | dict[int, "Value"]
Struct = dict[int, Value]


class CompactReader:
    """Reads structures one after another from `data`.

    Every method raises ValueError or IndexError on what is not of the shape that it is given.
    """

    __slots__ = ("_data", "at")

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def struct(self, shape: Shape) -> Struct:
        """The fields of the next structure."""
        fields: Struct = {}
        number = 0
        while (field := self.field(number)) is not None:
            number, kind = field
            if number in fields or number not in shape:
                raise ValueError(f"field {number}")
            fields[number] = self.value(kind, shape[number])
        return fields

    def field(self, number: int) -> tuple[int, int] | None:
        """Number and kind of the field after field `number` (0 before the first); None at the end."""
        head = self._data[self.at]
        self.at += 1
        if head == 0:
            return None
        return (number + (head >> 4) if head >> 4 else self._signed(I16)), head & 15

    def list_head(self, kind: int, item: int) -> int:
        """The number of items of a list, which follow."""
        head = self._take(1)[0]
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if kind != _LIST or head & 15 != item or size > len(self._data) - self.at:
            raise ValueError(f"a list of {size} items of kind {head & 15}")
        return size

    def value(self, kind: int, wanted: Kind) -> Value:
        """A value that is `kind` on disk."""
        if isinstance(wanted, dict):
            if kind != _STRUCT:
                raise ValueError(f"kind {kind} for a structure")
            return self.struct(wanted)
        if isinstance(wanted, ListOf):
            item = wanted.item if isinstance(wanted.item, int) else _STRUCT
            return [self.value(item, wanted.item) for _ in range(self.list_head(kind, item))]
        if kind != wanted:
            raise ValueError(f"kind {kind} for kind {wanted}")
        return self._take(self._varint()) if kind == BINARY else self._signed(kind)

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

    def _signed(self, kind: int) -> int:
        value = self._varint()
        if value >> _BITS[kind]:
            raise ValueError(f"a number of more than {_BITS[kind]} bits")
        return (value >> 1) ^ -(value & 1)

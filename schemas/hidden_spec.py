"""Which hidden states a cache keeps, and how they are stored."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from schemas.errors import CacheError, IncompatibleError
from schemas.strict import Fields

Encoding = Literal["int8", "float16"]

MAX_LAYERS = 1024
MAX_HIDDEN_SIZE = 1 << 17


@dataclass(frozen=True, slots=True)
class HiddenSpec:
    """The layout of the hidden-state family.

    Attributes:
        layers: block numbers, ascending, >= 0.
        hidden_size: width d of every one of them.
        encoding: "int8" (a float16 scale for each `group_size` values) or "float16".
        group_size: values that share a scale.
        rank: 0 stores the states themselves, r > 0 their r coordinates in a PCA basis (a sidecar).

    Raises:
        IncompatibleError: a value outside its bounds.
    """

    layers: tuple[int, ...]
    hidden_size: int
    encoding: Encoding = "int8"
    group_size: int = 64
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        fields = Fields(self.to_json(), where="HiddenSpec", error=IncompatibleError)
        _read(fields)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            fields.fail("ascending layers, at least one", self.layers)
        if self.rank > self.hidden_size:
            fields.fail(f"rank <= hidden_size {self.hidden_size}", self.rank)

    @property
    def width(self) -> int:
        """Stored values per token and layer."""
        return self.rank or self.hidden_size

    @property
    def num_scales(self) -> int:
        """Scales per token and layer."""
        return -(-self.width // self.group_size) if self.encoding == "int8" else 0

    @property
    def row_bytes(self) -> int:
        """Bytes that one layer of a token takes unpacked and decoded together."""
        stored = self.width + 2 * self.num_scales if self.num_scales else 2 * self.width
        return stored + 4 * (self.hidden_size + self.width)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {
            "layers": list(self.layers),
            "hidden_size": self.hidden_size,
            "encoding": self.encoding,
            "group_size": self.group_size,
            "rank": self.rank,
        }

    @staticmethod
    def from_json(raw: object, *, where: str) -> "HiddenSpec":
        """The spec in a JSON object; every key must be there and no other.

        Raises:
            CorruptionError: a missing or unknown key, a wrong type, a value out of bounds.
        """
        fields = Fields(raw, where=where)
        values = _read(fields)
        try:
            return HiddenSpec(**values)
        except CacheError as error:
            raise fields.corrupt(error) from error


def _read(fields: Fields) -> dict[str, Any]:
    values = {
        "layers": fields.integers("layers", 0, MAX_LAYERS - 1, max_length=MAX_LAYERS),
        "hidden_size": fields.integer("hidden_size", 1, MAX_HIDDEN_SIZE),
        "encoding": cast(Encoding, fields.choice("encoding", ("int8", "float16"))),
        "group_size": fields.integer("group_size", 1, MAX_HIDDEN_SIZE),
        "rank": fields.integer("rank", 0, MAX_HIDDEN_SIZE),
    }
    fields.finish()
    return values

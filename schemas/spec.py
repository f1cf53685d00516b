"""What is stored for a token: head size, tail mode, curve nodes and the grids the values are rounded to."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from schemas.curve import TailCurve
from schemas.errors import CacheError, IncompatibleError
from schemas.strict import Fields

Tail = Literal["none", "bucket", "sketch"]

MAX_VOCAB_SIZE = 1 << 24
MAX_K = 4096
MAX_NODES = 32
MAX_NODE = 8.0
DEFAULT_NODES = (0.0625, 0.1875, 0.375, 0.5, 0.75, 0.875, 1.0)


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """The layout of every target in a cache.

    Attributes:
        vocab_size: V, the number of teacher logits.
        k: head entries per token.
        tail: "sketch" (complete over the vocabulary), "bucket" (the tail is one event) or "none".
        curve_nodes: stored b = 1/T of the tail curve, ascending, 1.0 among them; emptied for "none".
        curve_step: grid of the curve values, nats.
        logprob_step: grid of the log-probabilities relative to the largest, nats.

    Raises:
        IncompatibleError: a value outside its bounds.
    """

    vocab_size: int
    k: int = 16
    tail: Tail = "sketch"
    curve_nodes: tuple[float, ...] = DEFAULT_NODES
    curve_step: float = 1 / 256
    logprob_step: float = 1 / 128

    def __post_init__(self) -> None:
        if self.tail == "none":
            object.__setattr__(self, "curve_nodes", ())
        object.__setattr__(self, "curve_nodes", tuple(float(b) for b in self.curve_nodes))
        fields = Fields(self.to_json(), where="TargetSpec", error=IncompatibleError)
        _read(fields)
        largest_k = self.vocab_size - (self.tail != "none")
        if self.k > largest_k:
            fields.fail(
                f"k <= {largest_k} with a vocabulary of {self.vocab_size} and tail '{self.tail}'", self.k
            )
        nodes = self.curve_nodes
        if self.tail != "none" and (list(nodes) != sorted(set(nodes)) or 1.0 not in nodes):
            fields.fail("ascending curve_nodes with 1.0 among them", nodes)

    @property
    def num_nodes(self) -> int:
        """Stored curve values per token."""
        return len(self.curve_nodes)

    @property
    def curve(self) -> TailCurve:
        """The interpolation of the tail curve; only with a tail."""
        return TailCurve(self.curve_nodes, self.vocab_size, self.k)

    def with_k(self, k: int) -> "TargetSpec":
        """The spec of the same targets truncated to a smaller head.

        Raises:
            IncompatibleError: `k` is not from 1 to the stored k.
        """
        if not 1 <= k <= self.k:
            raise IncompatibleError(f"TargetSpec: k must be from 1 to the stored {self.k}, found {k}")
        return replace(self, k=k)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field."""
        return {
            "vocab_size": self.vocab_size,
            "k": self.k,
            "tail": self.tail,
            "curve_nodes": list(self.curve_nodes),
            "curve_step": self.curve_step,
            "logprob_step": self.logprob_step,
        }

    @staticmethod
    def from_json(raw: object, *, where: str) -> "TargetSpec":
        """The spec in a JSON object; every key must be there and no other.

        Raises:
            CorruptionError: a missing or unknown key, a wrong type, a value out of bounds.
        """
        fields = Fields(raw, where=where)
        values = _read(fields)
        try:
            return TargetSpec(**values)
        except CacheError as error:
            raise fields.corrupt(error) from error


def _read(fields: Fields) -> dict[str, Any]:
    values = {
        "vocab_size": fields.integer("vocab_size", 2, MAX_VOCAB_SIZE),
        "k": fields.integer("k", 1, MAX_K),
        "tail": cast(Tail, fields.choice("tail", ("none", "bucket", "sketch"))),
        "curve_nodes": fields.numbers("curve_nodes", 1e-3, MAX_NODE, max_length=MAX_NODES),
        "curve_step": fields.number("curve_step", 1e-5, 1.0),
        "logprob_step": fields.number("logprob_step", 1e-4, 1.0),
    }
    fields.finish()
    return values

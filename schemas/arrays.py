"""The compressed targets of many tokens as plain NumPy arrays. Making or slicing one copies nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TargetArrays:
    """What the teacher said about the next token, for tokens of any leading shape.

    With `u` the log-probabilities of the head, `z_ref` its smallest logit and `b = 1/T`, at temperature T

        L = logaddexp(logsumexp_i(b u_i), b u_k + A(b))
        log p(i) = b u_i - L,   log tail mass = b u_k + A(b) - L

    Attributes:
        head_ids: int32 [..., k], in descending teacher logit, ties by lower id.
        head_logprobs: float32 [..., k], natural log at T=1.
        tail_curve: float32 [..., m], A(b) = log sum over the tail of exp(b (z_j - z_ref)) at the stored
            nodes b; m = 0 when no tail is kept.
        coordinates: float32 [..., r], sketch coordinates; r = 0 without a sketch.
    """

    head_ids: Int32
    head_logprobs: Float32
    tail_curve: Float32
    coordinates: Float32

    def __post_init__(self) -> None:
        shapes = {a.shape[:-1] for a in self.parts()}
        if len(shapes) != 1 or self.head_ids.shape != self.head_logprobs.shape:
            raise ValueError(f"TargetArrays: all parts must share their leading shape, found {self.shapes()}")

    def parts(self) -> tuple[npt.NDArray[Any], ...]:
        """The four arrays, in the order of the fields."""
        return self.head_ids, self.head_logprobs, self.tail_curve, self.coordinates

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the four arrays."""
        return tuple(a.shape for a in self.parts())

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape without the last axis."""
        return self.head_ids.shape[:-1]

    @property
    def k(self) -> int:
        """Entries in the head."""
        return int(self.head_ids.shape[-1])

    @property
    def num_nodes(self) -> int:
        """Stored nodes of the tail curve."""
        return int(self.tail_curve.shape[-1])

    @property
    def rank(self) -> int:
        """Sketch coordinates."""
        return int(self.coordinates.shape[-1])

    def __getitem__(self, index: Any) -> "TargetArrays":
        """The same selection of the leading axes in every part; `index` must not touch the last axis."""
        return TargetArrays(*(a[index] for a in self.parts()))

    def reshape(self, *leading: int) -> "TargetArrays":
        """Another leading shape over the same tokens."""
        return TargetArrays(*(a.reshape(*leading, a.shape[-1]) for a in self.parts()))

    @staticmethod
    def concatenate(parts: Sequence["TargetArrays"]) -> "TargetArrays":
        """Tokens of several targets one after another along the first axis."""
        columns = zip(*(p.parts() for p in parts), strict=True)
        return TargetArrays(*(np.concatenate(c) for c in columns))

    @staticmethod
    def empty(num_tokens: int, *, k: int, num_nodes: int, rank: int) -> "TargetArrays":
        """All-zero arrays, as a masked token has them."""
        return TargetArrays(
            np.zeros((num_tokens, k), np.int32),
            np.zeros((num_tokens, k), np.float32),
            np.zeros((num_tokens, num_nodes), np.float32),
            np.zeros((num_tokens, rank), np.float32),
        )


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The text side of the same tokens.

    Attributes:
        token_ids: int32 [n], the input id at each position.
        sequences: int32 [n], number of the sequence in the data set, ascending.
        documents: int32 [n], number of the document inside its sequence; attention never crosses documents.
        loss_mask: bool [n], true where the prediction of the next token is trained.
    """

    token_ids: Int32
    sequences: Int32
    documents: Int32
    loss_mask: Bool

    def __post_init__(self) -> None:
        if len({a.shape for a in (self.token_ids, self.sequences, self.documents, self.loss_mask)}) != 1:
            raise ValueError("TokenRows: all columns must have the same length")

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, index: Any) -> "TokenRows":
        columns = (self.token_ids, self.sequences, self.documents, self.loss_mask)
        return TokenRows(*(a[index] for a in columns))

"""Padded batches of cached sequences as NumPy arrays. Cost: one copy of the decoded values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pmetal_distill.labels import IGNORE_INDEX
from schemas.arrays import Bool, Float32, Int32, TargetArrays
from schemas.errors import IncompatibleError

PADDING_DOCUMENT = -1


@dataclass(frozen=True, slots=True, eq=False)
class StoredSequence:
    """One sequence as decoded from the cache.

    Attributes:
        number: its number in the data set.
        token_ids, documents: int32 [n].
        loss_mask: bool [n].
        targets: [n, ...].
        basis_index: which of the cache's bases its coordinates belong to; -1 without a sketch.
        hidden: float32 [n, d] by layer.
    """

    number: int
    token_ids: Int32
    documents: Int32
    loss_mask: Bool
    targets: TargetArrays
    basis_index: int
    hidden: Mapping[int, Float32] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences padded at the end to a common length L.

    Attributes:
        token_ids: int32 [B, L], 0 in the padding.
        documents: int32 [B, L], -1 in the padding.
        loss_mask: bool [B, L], false in the padding.
        labels: int32 [B, L], the next token of the same document, -100 where there is none.
        targets: [B, L, ...], zeros where the mask is false.
        basis_index: int32 [B], see `StoredSequence`.
        hidden: float32 [B, L, d] by layer.
        numbers: int32 [B], numbers of the sequences.
    """

    token_ids: Int32
    documents: Int32
    loss_mask: Bool
    labels: Int32
    targets: TargetArrays
    basis_index: Int32
    hidden: Mapping[int, Float32]
    numbers: Int32

    @property
    def num_trained_tokens(self) -> int:
        """Positions with a soft target."""
        return int(self.loss_mask.sum())


def next_token_labels(token_ids: Int32, documents: Int32) -> Int32:
    """int32 [..., L]: the token after each position if it is of the same document, else -100."""
    labels = np.full_like(token_ids, IGNORE_INDEX)
    same = (documents[..., 1:] == documents[..., :-1]) & (documents[..., 1:] != PADDING_DOCUMENT)
    np.copyto(labels[..., :-1], token_ids[..., 1:], where=same)
    return labels


def padded_length(longest: int, *, pad_multiple: int, length: int | None) -> int:
    """L for sequences of at most `longest` tokens.

    Raises:
        IncompatibleError: a fixed `length` that is too short.
    """
    if length is None:
        return -(-longest // pad_multiple) * pad_multiple
    if longest > length:
        raise IncompatibleError(
            f"batches: length must be at least the longest sequence, {longest}, found {length}"
        )
    return length


def collate(sequences: Sequence[StoredSequence], length: int, *, empty: TargetArrays) -> Batch:
    """Pad to `length` and stack; `empty` gives the widths of the targets when there are no sequences."""
    token_ids = _pad([s.token_ids for s in sequences], length, fill=0, like=np.zeros(0, np.int32))
    documents = _pad(
        [s.documents for s in sequences], length, fill=PADDING_DOCUMENT, like=np.zeros(0, np.int32)
    )
    parts = zip(*(s.targets.parts() for s in sequences), strict=True) if sequences else [()] * 4
    targets = [_pad(p, length, fill=0, like=like) for p, like in zip(parts, empty.parts(), strict=True)]
    layers = sequences[0].hidden if sequences else {}
    return Batch(
        token_ids=token_ids,
        documents=documents,
        loss_mask=_pad([s.loss_mask for s in sequences], length, fill=0, like=np.zeros(0, np.bool_)),
        labels=next_token_labels(token_ids, documents),
        targets=TargetArrays(*targets),
        basis_index=np.array([s.basis_index for s in sequences], np.int32),
        hidden={i: _pad([s.hidden[i] for s in sequences], length, fill=0, like=a) for i, a in layers.items()},
        numbers=np.array([s.number for s in sequences], np.int32),
    )


def _pad(
    rows: Sequence[npt.NDArray[Any]], length: int, *, fill: int, like: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """[B, length, ...] of the type and width of `like`."""
    out = np.empty((len(rows), length, *like.shape[1:]), like.dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
        target[len(row) :] = fill
    return out

"""Packed sequences as padded arrays of equal shape, for a forward pass without gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data import PackedDataset
from pmetal_distill.offline.batch import PADDING_DOCUMENT, next_token_labels


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Several sequences side by side.

    Attributes:
        sequences: numbers of the sequences in the data set, B of them.
        lengths: tokens in each.
        token_ids: int32 [B, L], zero behind a sequence's end.
        documents: int32 [B, L], document of each token, -1 behind the end.
        loss_mask: bool [B, L], where the prediction of the next token is trained.
        labels: int32 [B, L], the next token of the same document in the same sequence, else -100.
    """

    sequences: Sequence[int]
    lengths: Sequence[int]
    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    labels: NDArray[np.int32]

    def only(self, rows: Sequence[int]) -> "TokenBatch":
        """Some rows of the batch, as long as before."""
        chosen = list(rows)
        return TokenBatch(
            [self.sequences[i] for i in rows],
            [self.lengths[i] for i in rows],
            self.token_ids[chosen],
            self.documents[chosen],
            self.loss_mask[chosen],
            self.labels[chosen],
        )


def token_batches(
    dataset: PackedDataset, sequences: Sequence[int], *, batch_size: int
) -> Iterator[TokenBatch]:
    """The named sequences, `batch_size` at a time, in the given order."""
    for start in range(0, len(sequences), batch_size):
        yield collate(dataset, [int(number) for number in sequences[start : start + batch_size]])


def collate(dataset: PackedDataset, numbers: Sequence[int]) -> TokenBatch:
    """Pads the sequences to the longest of them."""
    rows = [dataset.sequence(number) for number in numbers]
    lengths = [len(row.token_ids) for row in rows]
    shape = (len(rows), max(lengths))
    token_ids = np.zeros(shape, np.int32)
    documents = np.full(shape, PADDING_DOCUMENT, np.int32)
    loss_mask = np.zeros(shape, np.bool_)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        token_ids[index, :length] = row.token_ids
        documents[index, :length] = row.documents
        loss_mask[index, :length] = row.loss_mask
    return TokenBatch(
        numbers, lengths, token_ids, documents, loss_mask, next_token_labels(token_ids, documents)
    )

"""Runs the teacher's body over packed sequences. Costs its forward pass.

Of the hidden states that the head takes only the trained positions are kept, so prompts that are not trained
on cost no head product. States that a calibration pass has computed can be kept for the main pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.batching import TokenBatch, collate
from pipeline.data import PackedDataset

if TYPE_CHECKING:
    import mlx.core as mx

    from pmetal_distill.models import LoadedModel


@dataclass(frozen=True, slots=True, eq=False)
class TeacherStates:
    """What the teacher's body says about one sequence.

    Attributes:
        number: of the sequence in the data set.
        token_ids, documents: int32 [n].
        loss_mask: bool [n].
        final: [t, d] for the t trained positions, in order: what the head takes (logits [t, V] if the
            teacher cannot be split).
        layers: block -> float32 [n, d], for every position.
    """

    number: int
    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    final: "mx.array"
    layers: dict[int, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class TeacherRunner:
    """Feeds sequences to the teacher in batches of fixed composition.

    Which sequences share a batch in `run` depends on their numbers and on nothing else, so that an
    interrupted run and an uninterrupted one compute the same.

    Args:
        model: the teacher.
        dataset: packed text.
        batch_size: sequences in a forward pass.
        layers: blocks whose outputs are wanted too.
        keep_tokens: keep the states of up to so many trained positions for a second use.
    """

    model: "LoadedModel"
    dataset: PackedDataset
    batch_size: int
    layers: Sequence[int] = ()
    keep_tokens: int = 0
    _kept: dict[int, list[TeacherStates]] = field(default_factory=dict)
    _kept_tokens: int = 0

    def batch_of(self, sequence: int) -> range:
        """The numbers of the sequences that share a forward pass with `sequence`."""
        start = sequence - sequence % self.batch_size
        return range(start, min(start + self.batch_size, self.dataset.num_sequences))

    def run(self, sequences: Sequence[int], *, keep: bool = False) -> Iterator[TeacherStates]:
        """The named sequences, ascending, each in its own fixed batch."""
        wanted = set(sequences)
        for start in sorted({self.batch_of(number).start for number in wanted}):
            yield from (states for states in self._batch(start, keep=keep) if states.number in wanted)

    def sample(self, sequences: Sequence[int]) -> Iterator[TeacherStates]:
        """The named sequences in the given order, batched with each other: cheap for a few spread ones."""
        for start in range(0, len(sequences), self.batch_size):
            numbers = [int(number) for number in sequences[start : start + self.batch_size]]
            yield from self._forward(collate(self.dataset, numbers))

    def _batch(self, start: int, *, keep: bool) -> list[TeacherStates]:
        """States of a fixed batch; kept ones are given away once, unless `keep` asks to keep them on."""
        if start in self._kept:
            if keep:
                return self._kept[start]
            states = self._kept.pop(start)
            self._kept_tokens -= _num_rows(states)
            return states
        states = list(self._forward(collate(self.dataset, self.batch_of(start))))
        if keep and self._kept_tokens + _num_rows(states) <= self.keep_tokens:
            self._kept[start] = states
            self._kept_tokens += _num_rows(states)
        return states

    def _forward(self, batch: TokenBatch) -> Iterator[TeacherStates]:
        import mlx.core as mx

        token_ids = mx.array(batch.token_ids)
        if self.model.splits:
            hidden = self.model.hidden(token_ids, documents=batch.documents, layers=self.layers)
            final, layers = hidden.final, hidden.layers
        else:
            final, layers = self.model.full(token_ids, documents=batch.documents), {}
        mx.eval(final, layers)
        blocks = {index: np.array(states.astype(mx.float32)) for index, states in layers.items()}
        for row, (number, length) in enumerate(zip(batch.sequences, batch.lengths, strict=True)):
            mask = batch.loss_mask[row, :length]
            rows = mx.array(np.flatnonzero(mask).astype(np.int32))
            yield TeacherStates(
                number=number,
                token_ids=batch.token_ids[row, :length],
                documents=batch.documents[row, :length],
                loss_mask=mask,
                final=final[row][rows],
                layers={index: states[row, :length] for index, states in blocks.items()},
            )


def _num_rows(states: Sequence[TeacherStates]) -> int:
    return sum(len(item.final) for item in states)

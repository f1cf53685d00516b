"""Runs the teacher's body over packed sequences. Costs its forward pass.

Of the hidden states that the head takes only the trained positions are kept, so prompts that are not trained
on cost no head product. States that a calibration pass has computed can be kept for the main pass. Nothing
here waits for a device: arrays are computed when they are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.batching import TokenBatch, collate, token_batches
from pipeline.data import PackedDataset

if TYPE_CHECKING:
    import mlx.core as mx

    from pmetal_distill.models import LoadedModel


@dataclass(frozen=True, slots=True, eq=False)
class TeacherStates:
    """What the teacher's body says about the sequences of a batch.

    Attributes:
        batch: their tokens, [B, L].
        final: [t, d] for the t trained positions of all of them, in order: what the head takes (logits
            [t, V] if the teacher cannot be split).
        layers: block -> [B, L, d], for every position.
    """

    batch: TokenBatch
    final: "mx.array"
    layers: "Mapping[int, mx.array]" = field(default_factory=dict)

    @property
    def starts(self) -> NDArray[np.int64]:
        """int64 [B + 1]: rows `starts[i]:starts[i + 1]` of `final` are those of sequence i."""
        return np.concatenate([[0], np.cumsum(self.batch.loss_mask.sum(axis=1))]).astype(np.int64)

    def place(self, row: int) -> str:
        """The name of a row of `final`, for messages."""
        index = int(np.searchsorted(self.starts, row, side="right")) - 1
        position = np.flatnonzero(self.batch.loss_mask[index])[row - self.starts[index]]
        return f"sequence {self.batch.sequences[index]} position {position}"

    def only(self, numbers: Sequence[int]) -> "TeacherStates":
        """The same for some of the sequences, in the batch's order."""
        wanted = set(numbers)
        kept = [i for i, number in enumerate(self.batch.sequences) if number in wanted]
        if len(kept) == len(self.batch.sequences):
            return self
        import mlx.core as mx

        from pmetal_distill.host_inputs import to_device

        starts, sequences = self.starts, mx.array(kept)
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in kept]).astype(np.int32)
        layers = {index: states[sequences] for index, states in self.layers.items()}
        return TeacherStates(self.batch.only(kept), self.final[to_device(rows)], layers)


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
    _kept: dict[int, TeacherStates] = field(default_factory=dict)
    _kept_tokens: int = 0
    _cut: tuple[int, TeacherStates] | None = None

    def batch_of(self, sequence: int) -> range:
        """The numbers of the sequences that share a forward pass with `sequence`."""
        start = sequence - sequence % self.batch_size
        return range(start, min(start + self.batch_size, self.dataset.num_sequences))

    def run(self, sequences: Sequence[int], *, keep: bool = False) -> Iterator[TeacherStates]:
        """The named sequences, ascending, those of one fixed batch together."""
        for start, members in groupby(sorted(set(sequences)), key=lambda n: self.batch_of(n).start):
            numbers = list(members)
            states = self._batch(start, keep=keep)
            part = states.only(numbers)
            if not keep:
                # The rest of a batch is mostly asked for next, where one shard ends and another begins.
                self._cut = None if part is states else (start, states)
            yield part

    def sample(self, sequences: Sequence[int]) -> Iterator[TeacherStates]:
        """The named sequences in the given order, batched with each other: cheap for a few spread ones."""
        for start in range(0, len(sequences), self.batch_size):
            numbers = [int(number) for number in sequences[start : start + self.batch_size]]
            yield self._forward(collate(self.dataset, numbers))

    def first_overflow(self, sequences: Sequence[int]) -> int | None:
        """The first layer that overflows in float16 on these sequences; None if none does."""
        from pmetal_distill.host_inputs import to_device
        from pmetal_distill.modelling.overflow import first_overflowing_layer

        for batch in token_batches(self.dataset, sequences, batch_size=self.batch_size):
            layer = first_overflowing_layer(self.model, to_device(batch.token_ids), batch.documents)
            if layer is not None:
                return layer
        return None

    def forget_before(self, sequence: int) -> None:
        """Gives up kept states of batches that lie before a sequence."""
        for start in [start for start in self._kept if start + self.batch_size <= sequence]:
            self._kept_tokens -= len(self._kept.pop(start).final)

    def _batch(self, start: int, *, keep: bool) -> TeacherStates:
        """States of a fixed batch; kept ones are given away once, unless `keep` asks to keep them on."""
        import mlx.core as mx

        if start in self._kept:
            if keep:
                return self._kept[start]
            states = self._kept.pop(start)
            self._kept_tokens -= len(states.final)
            return states
        if self._cut is not None and self._cut[0] == start:
            return self._cut[1]
        states = self._forward(collate(self.dataset, self.batch_of(start)))
        if keep and self._kept_tokens + len(states.final) <= self.keep_tokens:
            mx.async_eval(states.final, dict(states.layers))
            self._kept[start] = states
            self._kept_tokens += len(states.final)
        return states

    def _forward(self, batch: TokenBatch) -> TeacherStates:
        from pmetal_distill.host_inputs import to_device

        token_ids = to_device(batch.token_ids)
        if self.model.splits:
            hidden = self.model.hidden(token_ids, documents=batch.documents, layers=self.layers)
            final, layers = hidden.final, hidden.layers
        else:
            final, layers = self.model.full(token_ids, documents=batch.documents), {}
        trained = to_device(np.flatnonzero(batch.loss_mask).astype(np.int32))
        return TeacherStates(batch, final.reshape(-1, final.shape[-1])[trained], layers)

"""A model taken apart: hidden states, logits, documents kept apart. Costs what the plain call costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pmetal_distill.host_inputs import to_device
from pmetal_distill.losses.head import HeadParts
from pmetal_distill.losses.host import can_evaluate
from pmetal_distill.modelling.anatomy import Anatomy, run_body, run_head
from pmetal_distill.modelling.documents import (
    document_caches,
    documents_apart,
    fits_windows,
    holds_one_document,
)
from pmetal_distill.modelling.heads import LinearHead
from pmetal_distill.precision import Types, dtype_name, float_types, main_type
from schemas.errors import ModelError

Documents = np.ndarray[Any, Any] | mx.array
_Pass = tuple[mx.array, list[Any] | None]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states of a batch.

    Attributes:
        final: [B, L, d], what the head takes (after the final norm).
        layers: block index -> [B, L, d], the output of that block.
    """

    final: mx.array
    layers: dict[int, mx.array] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A language model, taken apart. The parameters are read when used, so it follows training.

    After exchanging modules of `model` (LoRA), take it apart again with `wrap_model`.

    Attributes:
        model: the mlx-lm model.
        tokenizer: mlx-lm's wrapper of it.
        config: its configuration.
        source: what it was loaded from, as given.
        folder: the mlx-lm folder it was loaded from; None for a model made in memory.
        anatomy: where its parts are.
        stored: the type of each floating-point parameter on disk, where it may be another in memory.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    source: str
    folder: Path | None
    anatomy: Anatomy
    stored: Types = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of logits; may exceed the tokenizer's size."""
        return self.anatomy.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the final hidden states; 0 if the model cannot be split."""
        return self.anatomy.hidden_size

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return self.anatomy.num_layers

    @property
    def head(self) -> LinearHead | None:
        """The head as a matrix, if it is one."""
        return self.anatomy.head

    @property
    def splits(self) -> bool:
        """Whether `hidden` and `logits` are available; else only `full` is."""
        return self.anatomy.body is not None

    @property
    def supports_packing(self) -> bool:
        """Whether several documents can share a sequence without seeing each other, at no cost.

        Where they cannot, each is run in a row of its own, padded to the longest.
        """
        return self.anatomy.packing != "none"

    @property
    def dtype(self) -> str:
        """The type that it computes in, by name."""
        return dtype_name(main_type(float_types(self.model)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about this model, one sentence each."""
        return self.anatomy.notes

    def hidden(
        self, token_ids: mx.array, *, documents: Documents | None = None, layers: Sequence[int] = ()
    ) -> Hidden:
        """Runs the body.

        Args:
            token_ids: integers [B, L].
            documents: integers [B, L], tokens with different numbers do not see each other; negative after a
                document is padding. None: each sequence is one document. Where a NumPy array shows the same,
                the plain causal path is taken; an MLX array is not looked into.
            layers: blocks whose outputs are wanted, from 0; negative counts from the end.

        Raises:
            ModelError: the model cannot be split, or cannot keep documents apart inside `mx.compile`.
            ValueError: no such layer.
        """
        body = self._body()
        wanted = [self._layer(index) for index in layers]
        passes, joined = self._passes(token_ids, documents)
        runs = [
            run_body(self.model, body, self.anatomy.blocks, ids, caches, wanted) for ids, caches in passes
        ]
        final = joined([states for states, _ in runs])
        blocks = {index: joined([found[index] for _, found in runs]) for index in wanted}
        return Hidden(final, {index: blocks[self._layer(index)] for index in layers})

    def logits(self, hidden: mx.array) -> mx.array:
        """Final hidden states [..., d] -> logits [..., V], by the model's own head, soft-caps and all.

        Raises:
            ModelError: the model cannot be split.
        """
        return run_head(self.model, self._body(), hidden)

    def full(self, token_ids: mx.array, documents: Documents | None = None) -> mx.array:
        """Runs the whole model: [B, L] -> logits [B, L, V].

        Raises:
            ModelError: the model cannot keep documents apart inside `mx.compile`.
        """
        passes, joined = self._passes(token_ids, documents)
        return joined([self.model(ids, cache=caches) for ids, caches in passes])

    def scored(
        self, token_ids: mx.array, *, documents: Documents | None = None, layers: Sequence[int] = ()
    ) -> tuple[Hidden, HeadParts]:
        """Hidden states, and the head that makes logits of them, as the chunked losses take them.

        Where the head is no matrix, the states are the logits of the whole batch, and the head changes
        nothing: everything works, but in the memory of B L V values. Call it inside the function that is
        differentiated.

        Args:
            token_ids, documents, layers: as for `hidden`.

        Raises:
            ModelError: as `hidden`; or layers of a model that cannot be split are wanted.
        """
        if self.head is not None:
            return self.hidden(token_ids, documents=documents, layers=layers), HeadParts.of(self.head)
        if layers:
            states = self.hidden(token_ids, documents=documents, layers=layers)
            logits = Hidden(self.logits(states.final), states.layers)
        else:
            logits = Hidden(self.full(token_ids, documents))
        return logits, HeadParts.of_logits(self.vocab_size)

    def _body(self) -> tuple[str, ...]:
        if self.anatomy.body is None:
            raise ModelError(f"{self.source}: the head of this model cannot be split off; use its full call")
        return self.anatomy.body

    def _layer(self, index: int) -> int:
        if self.anatomy.blocks is None:
            raise ModelError(f"{self.source}: the outputs of this model's blocks cannot be had; ask for none")
        if not -self.num_layers <= index < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, found {index}")
        return index % self.num_layers

    def _passes(
        self, token_ids: mx.array, documents: Documents | None
    ) -> tuple[list[_Pass], Callable[[list[mx.array]], mx.array]]:
        """The calls that a batch takes, and what makes [B, L, n] of their results."""
        if isinstance(documents, np.ndarray) and holds_one_document(documents):
            documents = None
        windows = self.anatomy.windows
        if documents is None:
            plain = fits_windows(token_ids.shape[1], windows) or not self.supports_packing
            stand_ins = self.anatomy.needs_caches or not plain
            return [(token_ids, document_caches(None, windows) if stand_ins else None)], _joined
        if not self.supports_packing:
            return self._apart(token_ids, documents)
        numbers = to_device(documents) if isinstance(documents, np.ndarray) else documents
        if self.anatomy.packing == "batch":
            return [(token_ids, document_caches(numbers, windows))], _joined
        rows = [slice(i, i + 1) for i in range(len(token_ids))]
        return [(token_ids[r], document_caches(numbers[r].squeeze(0), windows)) for r in rows], _joined

    def _apart(
        self, token_ids: mx.array, documents: Documents
    ) -> tuple[list[_Pass], Callable[[list[mx.array]], mx.array]]:
        """One call with a row for each document."""
        if isinstance(documents, mx.array) and not can_evaluate(documents):
            raise ModelError(
                f"{self.source}: inside mx.compile this model cannot keep several documents apart in one "
                "sequence; give it one document per sequence, or do not compile"
            )
        places, back = documents_apart(np.asarray(documents))
        ids = token_ids.reshape(-1)[to_device(places)]
        order = to_device(back)

        def joined(parts: list[mx.array]) -> mx.array:
            return parts[0].reshape(-1, parts[0].shape[-1])[order]

        return self._passes(ids, None)[0], joined


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)

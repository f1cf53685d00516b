"""Where the teacher's answers come from: a live model or a cache. The distiller does not know which it has.

A cached teacher costs an upload of the batch; a live one a forward pass of the teacher, whose logits are made
a chunk at a time where its head can be split off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from pmetal_distill.host_inputs import to_device
from pmetal_distill.models import LoadedModel
from pmetal_distill.offline.batch import Batch, next_token_labels
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from schemas.errors import IncompatibleError

Int32 = npt.NDArray[np.int32]


class TrainingBatch(Protocol):
    """Text to train on; `offline.batch.Batch` is one, with the teacher's answers."""

    @property
    def token_ids(self) -> Int32:
        """[B, L]."""
        ...

    @property
    def documents(self) -> Int32:
        """[B, L]; tokens with different numbers do not see each other, negative is padding."""
        ...

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_]:
        """[B, L], where the prediction of the next token is trained."""
        ...

    @property
    def labels(self) -> Int32:
        """[B, L], the next token, -100 where there is none."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """A `TrainingBatch` for a live teacher; fields as there."""

    token_ids: Int32
    documents: Int32
    loss_mask: npt.NDArray[np.bool_]
    labels: Int32

    @staticmethod
    def of(token_ids: Any) -> "TextBatch":
        """Token ids [B, L], each row one document, trained at every position that has a next token."""
        ids = np.asarray(token_ids, np.int32)
        documents = np.zeros_like(ids)
        labels = next_token_labels(ids, documents)
        return TextBatch(ids, documents, labels >= 0, labels)


class Teacher(Protocol):
    """What the distiller asks of a teacher.

    Attributes:
        kind: of the targets it gives.
        hidden_size: width of its hidden states; None if it gives none.
        num_layers: its blocks; None if unknown.
        lowest_temperature: its targets have no meaning below.
    """

    kind: str
    hidden_size: int | None
    num_layers: int | None
    lowest_temperature: float

    def answer(
        self, batch: TrainingBatch, layers: tuple[int, ...]
    ) -> tuple[TeacherTarget, Mapping[int, mx.array]]:
        """Targets of the B L tokens of a batch, and hidden states [B, L, d] of the wanted layers."""
        ...


class LiveTeacher:
    """A teacher that runs beside the student.

    Args:
        model: the teacher.
        vocab_size: the student's; a larger vocabulary of the teacher is cut to it.
    """

    def __init__(self, model: LoadedModel, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = min(model.vocab_size, vocab_size)
        self.kind = "dense"
        self.hidden_size: int | None = model.hidden_size if model.splits else None
        self.num_layers: int | None = model.num_layers
        self.lowest_temperature = 0.0

    def logits(self, hidden: mx.array) -> mx.array:
        """Final hidden states [n, d] -> logits [n, V]."""
        return self._model.logits(hidden)[:, : self._vocab_size]

    def answer(
        self, batch: TrainingBatch, layers: tuple[int, ...]
    ) -> tuple[TeacherTarget, Mapping[int, mx.array]]:
        """See `Teacher.answer`."""
        ids = to_device(batch.token_ids)
        if not self._model.splits:
            logits = self._model.full(ids, batch.documents)[..., : self._vocab_size]
            return TeacherTarget.dense(logits), {}
        states = self._model.hidden(ids, documents=batch.documents, layers=layers)
        target = TeacherTarget.live(states.final, self, vocab_size=self._vocab_size)
        return target, states.layers


class CachedTeacher:
    """A teacher whose answers were written down.

    Args:
        cache: open, with the hidden layers that are wanted.
        vocab_size: the student's; a larger vocabulary of the teacher is cut to it. The teacher's if None.
    """

    def __init__(self, cache: LogitCache, vocab_size: int | None = None) -> None:
        self._spec = cache.spec
        self._vocab_size = min(cache.spec.vocab_size, vocab_size or cache.spec.vocab_size)
        self._bases = [TailBasis.from_sketch(b).restricted(self._vocab_size) for b in cache.bases]
        self.kind = str(cache.spec.tail)
        hidden, layers = cache.dataset.hidden, cache.dataset.meta.get("teacher_layers")
        self.hidden_size: int | None = hidden.hidden_size if hidden else None
        self.num_layers: int | None = int(layers) if layers else None
        nodes = cache.spec.curve_nodes
        self.lowest_temperature = 1 / nodes[-1] if nodes else 0.0

    def answer(
        self, batch: TrainingBatch, layers: tuple[int, ...]
    ) -> tuple[TeacherTarget, Mapping[int, mx.array]]:
        """See `Teacher.answer`.

        Raises:
            IncompatibleError: a batch without targets or without one of the layers.
        """
        if not hasattr(batch, "targets"):
            raise IncompatibleError("step: a cached teacher needs batches of its cache, found text alone")
        stored = cast(Batch, batch)
        if missing := [layer for layer in layers if layer not in stored.hidden]:
            raise IncompatibleError(
                f"step: the batch must hold the hidden states of layers {list(layers)}, missing {missing}; "
                f"open the cache with hidden_layers={list(layers)}"
            )
        return self.target(stored), {layer: to_device(stored.hidden[layer]) for layer in layers}

    def target(self, batch: Batch) -> TeacherTarget:
        """What the teacher said about the B L tokens of a batch, for any of the losses on logits."""
        return TeacherTarget.from_arrays(
            batch.targets,
            self._spec,
            bases=self._bases,
            basis_index=np.repeat(batch.basis_index, batch.token_ids.shape[1]),
            vocab_size=self._vocab_size,
        )

"""One teacher in the memory of several processes (tensor parallel), used by one of them as if it were whole.

Each holds a share of every block, and the embeddings and the head. Before a forward pass the process that
leads sends its tokens to the others, which run the same pass and keep nothing. Costs two sums of [B, L, d]
over all processes in each block; the head runs in the leader alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.core as mx
import numpy as np

from pmetal_distill.modelling.loaded import Documents, Hidden, LoadedModel
from pmetal_distill.models import load_model
from pmetal_distill.parallel import World
from pmetal_distill.precision import TeacherType
from schemas.errors import PeerLostError, UsageError

# What a header says is to be done.
_END, _HIDDEN, _FULL = range(3)
_HEADER = 5


@dataclass(frozen=True, slots=True, eq=False)
class ShardedModel(LoadedModel):
    """A share of a model; its calls are made in the leading process only and run in all.

    Attributes:
        world: the processes that hold the other shares.
    """

    world: World = field(default_factory=World)

    def hidden(
        self, token_ids: mx.array, *, documents: Documents | None = None, layers: Sequence[int] = ()
    ) -> Hidden:
        """As of a whole model, evaluated.

        Raises:
            PeerLostError: one of the others is gone.
        """
        documents = None if documents is None else np.array(documents)
        self._send(_HIDDEN, token_ids, documents, layers)
        return self._run_hidden(token_ids, documents, layers)

    def full(self, token_ids: mx.array, documents: Documents | None = None) -> mx.array:
        """As of a whole model, evaluated.

        Raises:
            PeerLostError: one of the others is gone.
        """
        documents = None if documents is None else np.array(documents)
        self._send(_FULL, token_ids, documents, ())
        return self._run_full(token_ids, documents)

    def serve(self) -> None:
        """Runs what the leading process runs, until it has done.

        Raises:
            PeerLostError: it, or another one, is gone.
        """
        while True:
            kind, rows, length, with_documents, num_layers = self._receive(_HEADER).tolist()
            if kind == _END:
                return
            size = rows * length
            values = self._receive(size * (1 + with_documents) + num_layers)
            token_ids = mx.array(values[:size].reshape(rows, length))
            documents = values[size : 2 * size].reshape(rows, length) if with_documents else None
            if kind == _FULL:
                self._run_full(token_ids, documents)
            else:
                self._run_hidden(token_ids, documents, values[len(values) - num_layers :].tolist())

    def dismiss(self) -> None:
        """Ends `serve` in the other processes.

        Raises:
            PeerLostError: one of the others is gone.
        """
        self.world.sum(mx.array([_END, 0, 0, 0, 0], mx.int32))

    # What the sums of a pass wait for must be the same everywhere, so passes are evaluated one by one.
    def _run_hidden(self, token_ids: mx.array, documents: Documents | None, layers: Sequence[int]) -> Hidden:
        found = LoadedModel.hidden(self, token_ids, documents=documents, layers=layers)
        self.world.evaluate(found.final, found.layers)
        return found

    def _run_full(self, token_ids: mx.array, documents: Documents | None) -> mx.array:
        logits = LoadedModel.full(self, token_ids, documents)
        self.world.evaluate(logits)
        return logits

    def _send(
        self, kind: int, token_ids: mx.array, documents: Documents | None, layers: Sequence[int]
    ) -> None:
        header = [kind, *token_ids.shape, int(documents is not None), len(layers)]
        parts = [token_ids, *([] if documents is None else [documents]), list(layers)]
        values = np.concatenate([np.array(part, np.int32).ravel() for part in parts])
        self.world.sum(mx.array(header, mx.int32))
        self.world.sum(mx.array(values))

    def _receive(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """What the leader sends: the sum of its numbers and of everybody else's zeros."""
        return np.array(self.world.sum(mx.zeros(count, mx.int32)))


@contextmanager
def sharded_model(
    path_or_repo: str,
    world: World,
    *,
    dtype: TeacherType = "auto",
    trust_remote_code: bool = False,
    on_tokenizer: Callable[[Any], None] | None = None,
) -> Iterator[ShardedModel | None]:
    """Loads a model in shares and gives it to the leading process.

    The other processes serve it, and get None when the leading one has left the block. `dtype` and
    `on_tokenizer` are those of `load_model`.

    Raises:
        UsageError: there is one process.
        ModelError: as `load_model`, or it cannot be split over so many.
        PeerLostError: one of the others is gone.
    """
    if world.group is None:
        raise UsageError(
            "sharded: must run in several processes, found one; start it by 'mlx.launch -n 2 -- "
            "pmetal-pipeline ...', or leave --sharded out"
        )
    loaded = load_model(
        path_or_repo,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        group=world.group,
        on_tokenizer=on_tokenizer,
    )
    model = ShardedModel(**{part.name: getattr(loaded, part.name) for part in fields(loaded)}, world=world)
    if not world.leads:
        model.serve()
        yield None
        return
    try:
        yield model
    except PeerLostError:
        raise  # a ring that has failed once would be waited for without end
    except BaseException:
        model.dismiss()
        raise
    model.dismiss()

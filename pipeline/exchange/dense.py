"""Logits of the whole vocabulary: `.npy` beside token ids, or `.safetensors` with both.

    logits    [n, V], or [B, L, V] of B sequences (also named logprobs)      row t is about token t + 1
    token_ids [n] or [B, L] (also named input_ids); negative at the end: padding
    loss_mask, documents   optional, of the same shape; without a mask every row but the last is trained

Files are mapped: only the rows that are looked at are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.exchange.sequences import Logits, Source, SourceSequence, token_array
from pipeline.exchange.tensor_file import Tensor, open_npy, open_safetensors
from schemas.arrays import Float32
from schemas.errors import DataError, UsageError
from schemas.spec import MAX_VOCAB_SIZE

LOGITS = ("logits", "logprobs")
TOKENS = ("token_ids", "input_ids")


@dataclass(slots=True, eq=False)
class DenseSource(Source):
    """Dense logits; `tokens` goes with a single `.npy` file and is the last of `files` then."""

    tokens: Path | None = None

    def sequences(self) -> Iterator[SourceSequence]:
        self.dropped.clear()
        for file in self.files if self.tokens is None else self.files[:1]:
            yield from self._of_file(file, self._tensors(file))

    def _tensors(self, file: Path) -> dict[str, Tensor]:
        if self.tokens is not None:
            return {"logits": open_npy(file), "token_ids": open_npy(self.tokens)}
        return open_safetensors(file)

    def _of_file(self, file: Path, tensors: dict[str, Tensor]) -> Iterator[SourceSequence]:
        logits, tokens = _named(tensors, LOGITS, file), _named(tensors, TOKENS, file)
        single = len(logits.shape) == 2
        if (
            len(logits.shape) not in (2, 3)
            or tokens.shape != logits.shape[:-1]
            or not logits.floating
            or tokens.values.dtype.kind not in "iu"
        ):
            raise DataError(
                f"{file}: must have logits [n, V] or [B, L, V] and integer token ids of the shape without V, "
                f"found {list(logits.shape)} and {list(tokens.shape)}; write both for the same positions"
            )
        for number in range(1 if single else logits.shape[0]):
            index: tuple[int, ...] = () if single else (number,)
            yield self._sequence(tensors, logits, tokens, index, f"{file} sequence {number}")

    def _sequence(
        self, tensors: dict[str, Tensor], logits: Tensor, tokens: Tensor, index: tuple[int, ...], where: str
    ) -> SourceSequence:
        ids = np.asarray(tokens.values[index]).astype(np.int64)
        ids = ids[: int(np.flatnonzero(ids >= 0)[-1]) + 1] if (ids >= 0).any() else ids
        token_ids = token_array(ids, where)
        length = len(token_ids)
        mask = np.arange(length) < length - 1
        if "loss_mask" in tensors:
            mask = _aside(tensors["loss_mask"], tokens, index, length, f"{where}: loss_mask").astype(np.bool_)
        documents = np.zeros(length, np.int32)
        if "documents" in tensors:
            documents = _aside(tensors["documents"], tokens, index, length, f"{where}: documents")
            documents = documents.astype(np.int32)
            if documents.min() < 0:
                raise DataError(f"{where}: documents must be numbered from 0, found {documents.min()}")

        def rows(numbers: npt.NDArray[np.int64]) -> Float32:
            return logits.floats((*index, numbers))

        return SourceSequence(where, token_ids, documents, mask, Logits(rows, logits.shape[-1]))


def open_dense(source: Path, tokens: Path | None) -> DenseSource:
    """Dense logits.

    Args:
        source: a `.npy` file, a `.safetensors` file, or a folder of the latter.
        tokens: the `.npy` of token ids that goes with a `.npy`.

    Raises:
        DataError: nothing of that kind there.
        UsageError: `tokens` missing, or given beside `.safetensors`.
    """
    if source.suffix == ".npy":
        if tokens is None:
            raise UsageError(f"--tokens: must be given with {source.name}, found none; name its token ids")
        vocab_size = open_npy(source).shape[-1:]
        return DenseSource((source, tokens), vocab_size=_vocab_size(vocab_size, source), tokens=tokens)
    if tokens is not None:
        raise UsageError("--tokens: goes with .npy only, as .safetensors hold their token ids; leave it out")
    files = tuple(sorted(source.glob("*.safetensors")) if source.is_dir() else [source])
    if not files or files[0].suffix != ".safetensors":
        raise DataError(
            f"{source}: must be .npy, .safetensors or a folder of these, found none; check the path"
        )
    sizes = {_named(open_safetensors(file), LOGITS, file).shape[-1:] for file in files}
    if len(sizes) > 1:
        raise DataError(f"{source}: all files must have one vocabulary, found {sorted(sizes)}")
    return DenseSource(files, vocab_size=_vocab_size(sizes.pop(), files[0]))


def _vocab_size(last: tuple[int, ...], file: Path) -> int:
    if not last or not 2 <= last[0] <= MAX_VOCAB_SIZE:
        raise DataError(f"{file}: logits must have 2 to {MAX_VOCAB_SIZE} columns, found {last}")
    return int(last[0])


def _named(tensors: dict[str, Tensor], names: tuple[str, ...], file: Path) -> Tensor:
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        raise DataError(
            f"{file}: must have exactly one of {' and '.join(names)}, found {sorted(tensors)[:8]}; rename it"
        )
    return found[0]


def _aside(
    tensor: Tensor, tokens: Tensor, index: tuple[int, ...], length: int, what: str
) -> npt.NDArray[Any]:
    if tensor.shape != tokens.shape or tensor.values.dtype.kind not in "iub":
        raise DataError(
            f"{what} must be whole numbers of shape {list(tokens.shape)}, found {list(tensor.shape)}"
        )
    return np.asarray(tensor.values[index])[:length]

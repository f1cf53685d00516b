"""Targets that `mlx_lm.dwq --target-dir` writes: a file a batch, without the text they belong to.

    0000000000.safetensors    logits and indices [B, L, 1024], in no order; row t is about token t + 1

The text comes beside them: JSON lines with `token_ids`, in the order of the rows of all batches
(examples/dwq_tokens.py writes it). The logits of the other tokens are gone, so is the total: probabilities
are taken over the 1,024 that are there.

References:
    mlx_lm/quant/dwq.py (compute_dwq_targets), mlx_lm/tuner/trainer.py (iterate_batches).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.lines import read_json_lines
from pipeline.exchange.sequences import (
    MAX_ENTRIES,
    Heads,
    Source,
    SourceSequence,
    sorted_heads,
    token_array,
)
from pipeline.exchange.tensor_file import Tensor, open_safetensors
from schemas.arrays import Int32
from schemas.errors import DataError, UsageError


@dataclass(slots=True, eq=False)
class DwqSource(Source):
    """DWQ targets and their token ids; `files` are the batches, then the text."""

    def sequences(self) -> Iterator[SourceSequence]:
        self.dropped.clear()
        *batches, text = self.files
        lines = _token_lines(text)
        for file in batches:
            logits, indices = _batch(file)
            for row in range(logits.shape[0]):
                where, token_ids = next(lines, (str(text), None))
                if token_ids is None:
                    raise DataError(
                        f"{text}: must have a line for every row of every batch, found its end at {file} row "
                        f"{row}; write it with the same batch size, seed and samples"
                    )
                yield self._sequence(logits, indices, row, token_ids, where)
        if next(lines, None) is not None:
            raise DataError(f"{text}: must have a line for every row of every batch, found more; "
                            "give all batches, and the split they are of")  # fmt: skip

    def _sequence(
        self, logits: Tensor, indices: Tensor, row: int, token_ids: Int32, where: str
    ) -> SourceSequence:
        num_rows = len(token_ids) - 1
        if num_rows > logits.shape[1]:
            raise DataError(
                f"{where}: must have at most {logits.shape[1] + 1} tokens, as its batch has, found "
                f"{len(token_ids)}; see that text and targets are of one run"
            )
        values = logits.floats((row, slice(num_rows))).astype(np.float64)
        values -= np.logaddexp.reduce(values, axis=1, keepdims=True)
        heads = sorted_heads(indices.values[row, :num_rows], values, where)
        width = heads.ids.shape[1]
        heads = Heads(
            np.concatenate([heads.ids, np.zeros((1, width), np.int32)]),
            np.concatenate([heads.logprobs, np.full((1, width), -np.inf, np.float32)]),
        )
        return SourceSequence(where, token_ids, np.zeros_like(token_ids), heads.counts > 0, heads)


def open_dwq(source: Path, tokens: Path | None) -> DwqSource:
    """The targets of one split.

    Raises:
        UsageError: no text given.
        DataError: no targets there.
    """
    if tokens is None:
        raise UsageError(
            "--tokens: must be given, as DWQ targets come without text; examples/dwq_tokens.py writes it"
        )
    if not tokens.is_file():
        raise DataError(f"{tokens}: must be a file of token ids, found none; check the path")
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    if not files:
        inside = [name for name in ("train", "valid") if (source / name).is_dir()]
        advice = f"give {source / inside[0]}" if inside else "give the folder of one split"
        raise DataError(f"{source}: must hold 0000000000.safetensors and so on, found none; {advice}")
    return DwqSource((*files, tokens), mass_known=False)


def _token_lines(text: Path) -> Iterator[tuple[str, Int32]]:
    for line, record in read_json_lines(text):
        where = f"{text}:{line}"
        ids = record.get("token_ids") if isinstance(record, dict) else record
        yield where, token_array(ids, where, "'token_ids'")


def _batch(file: Path) -> tuple[Tensor, Tensor]:
    tensors = open_safetensors(file)
    logits, indices = tensors.get("logits"), tensors.get("indices")
    if logits is None or indices is None or logits.shape != indices.shape or len(logits.shape) != 3:
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise DataError(f"{file}: must have logits and indices [B, L, k], found {found}; give DWQ targets")
    if (
        not logits.floating
        or indices.values.dtype.kind not in "iu"
        or not 1 <= logits.shape[2] <= MAX_ENTRIES
    ):
        raise DataError(
            f"{file}: must have up to {MAX_ENTRIES} numbers and token ids a position, found other types"
        )
    return logits, indices

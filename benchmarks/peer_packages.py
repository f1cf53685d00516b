"""Formats that other projects' own code writes: mlx-lm (DWQ), gmlx, mlx-kld, DistillKit. Each is optional.

Each is fed the same logits: a stand-in for the model returns them, so nothing is run twice. The packages are
imported when a format is written or read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peer_formats import Said, Stored

CHUNK = 512


@dataclass(frozen=True, slots=True, eq=False)
class StandIn:
    """Says again what a model said: the logits of the window that a row begins with."""

    said: Said

    def number(self, row: np.ndarray) -> int | None:
        """Which window; the longest if several fit."""
        fits = [i for i, w in enumerate(self.said.windows) if np.array_equal(row[: len(w)], w)]
        return max(fits, key=lambda i: len(self.said.windows[i]), default=None)

    def __call__(self, ids: mx.array, **_: Any) -> mx.array:
        """Logits float16 [B, L, V]; those of padding are 0."""
        logits = np.zeros((*ids.shape, self.said.logits.shape[1]), np.float16)
        for row, out in zip(np.array(ids), logits, strict=True):
            found = self.number(row)
            if found is not None:
                part = self.said.slices[found]
                out[: part.stop - part.start] = self.said.logits[part]
        return mx.array(logits)


class Dwq:
    """`mlx_lm.dwq --target-dir`: the top 1,024 logits, unsorted, a safetensors file a batch; no text.

    Written by `compute_dwq_targets` with batches of one window. It drops the last position of each, so every
    window gets one more token.
    """

    name = "mlx-lm DWQ, top 1,024"
    seed = 123

    def data(self, said: Said) -> list[tuple[list[int], int]]:
        """Samples as DWQ takes them: tokens, and where its mask begins."""
        return [([*window.tolist(), 0], 0) for window in said.windows]

    def write(self, folder: Path, said: Said) -> None:
        from mlx_lm.quant.dwq import compute_dwq_targets

        data, longest = self.data(said), 1 + max(map(len, said.windows))
        compute_dwq_targets(StandIn(said), folder, data, [([0, 0], 0)], 1, longest, self.seed)
        for file in (folder / "valid").iterdir():
            file.unlink()

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        from mlx_lm.tuner.trainer import iterate_batches

        longest, stand_in = 1 + max(map(len, said.windows)), StandIn(said)
        batches = iterate_batches(self.data(said), 1, longest, seed=self.seed)
        order = [stand_in.number(np.array(ids[0])) for ids, _ in batches]
        shape = (len(said.logits), min(1024, said.logits.shape[1]))

        def read() -> Stored:
            ids, logits = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            for at, number in enumerate(order):
                arrays = mx.load(str(folder / "train" / f"{at:010d}.safetensors"))
                part = said.slices[number]
                ids[part] = np.array(arrays["indices"][0, : part.stop - part.start])
                logits[part] = np.array(arrays["logits"][0, : part.stop - part.start])
            return Stored(ids, logits)

        return read


@dataclass(frozen=True, slots=True)
class Gmlx:
    """`gmlx distill cache`: top-k log-probabilities, masses, text; safetensors of 64 windows, JSON lines."""

    k: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"gmlx, top {self.k}"

    def write(self, folder: Path, said: Said) -> None:
        from gmlx.distill.format import RowMeta, ShardWriter, pack_shard

        texts = [text.encode() for text in said.texts]
        rows = [
            self.row(said, part, window, len(text))
            for part, window, text in zip(said.slices, said.windows, texts, strict=True)
        ]
        writer = ShardWriter(folder, self.k, False)
        for at, start in enumerate(range(0, len(rows), 64)):
            part = slice(start, start + 64)
            about = [RowMeta(start + i, str(start + i), 0, len(w)) for i, w in enumerate(said.windows[part])]
            writer.write(at, pack_shard(rows[part], texts[part], self.k, False), about, 0.0)

    def row(self, said: Said, part: slice, window: np.ndarray, num_bytes: int) -> dict[str, np.ndarray]:
        """One window as gmlx's reduction leaves it."""
        from gmlx.distill.cache import reduce_logits

        following = np.append(window[1:], -1).astype(np.int32)
        kept = reduce_logits(
            mx.array(said.logits[part]),
            mx.array(following),
            K=self.k,
            log_bmask=mx.zeros(said.logits.shape[1]),
            onpath_valid=following >= 0,
        )
        ends = np.linspace(0, num_bytes, len(window)).astype(np.uint32)
        return kept | {"token_ids": window, "token_end_byte": ends, "onpath_mask": following >= 0}

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        from gmlx.distill.format import load_shard

        def read() -> Stored:
            shards = [load_shard(file) for file in sorted(folder.glob("*.safetensors"))]
            on = [shard["attention_mask"] for shard in shards]
            ids = np.concatenate([s["top_k_indices"][m] for s, m in zip(shards, on, strict=True)])
            values = np.concatenate([s["top_k_log_softmax"][m] for s, m in zip(shards, on, strict=True)])
            return Stored(ids, values.astype(np.float32))

        return read


@dataclass(frozen=True, slots=True)
class MlxKld:
    """mlx-kld's cache for scoring: top-k log-probabilities as bfloat16, int32 ids; safetensors a batch.

    It cuts one stream of tokens into equal pieces; so is the text here, with the logits of its windows.
    """

    k: int = 32768

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"mlx-kld, top {self.k:,}"

    def write(self, folder: Path, said: Said) -> None:
        import mlx_kld.cache as kld

        size = math.gcd(len(said.logits), CHUNK)
        chunks = said.token_ids.reshape(-1, size)
        whole = Said(list(chunks), said.logits, said.states, [])
        model = mock.Mock(side_effect=StandIn(whole))
        with (
            mock.patch.object(kld, "_load_model", return_value=(model, {})),
            mock.patch.object(kld, "_make_fresh_cache", return_value=None),
            mock.patch.object(kld, "measured_precision", return_value=None),
        ):
            shape = {"num_samples": len(chunks), "max_seq_len": size}
            about = {"dataset_name": "", "seed": 0, "teacher_tokenizer_hash": ""}
            kld.teacher_pass("teacher", mx.array(chunks), 1, self.k, folder, **shape, **about)

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        def read() -> Stored:
            shards = [mx.load(str(file)) for file in sorted(folder.glob("*.safetensors"))]
            ids = np.concatenate([np.array(shard["top_k_indices"])[0] for shard in shards])
            values = [np.array(s["top_k_log_softmax"].astype(mx.float32))[0] for s in shards]
            return Stored(ids, np.concatenate(values))

        return read


@dataclass(frozen=True, slots=True)
class DistillKit:
    """DistillKit's Parquet: log-probabilities and bit-packed ids as lists of bytes, a row a window.

    `config` holds the fields of its `logprob_compressor`; `d` is filled in.
    """

    label: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"DistillKit, {self.label}"

    def compressor(self, vocab_size: int) -> Any:
        """DistillKit's own."""
        from distillkit.compression.compressor import LogprobCompressor
        from distillkit.compression.config import DistributionQuantizationConfig

        return LogprobCompressor(config=DistributionQuantizationConfig(d=vocab_size, **self.config))

    def write(self, folder: Path, said: Said) -> None:
        import torch

        compressor = self.compressor(said.logits.shape[1])
        columns: dict[str, list[np.ndarray]] = {"compressed_logprobs": [], "bytepacked_indices": []}
        for part in said.slices:
            logprobs = torch.from_numpy(said.logits[part]).log_softmax(-1)
            best, ids = logprobs.topk(self.config["k"], dim=-1)
            packed = compressor.compress_from_sparse(ids[None], best[None])
            for key, rows in columns.items():
                rows.append(packed[key][0].numpy())
        ends = np.cumsum([0, *map(len, said.windows)]).astype(np.int32)
        ids = pa.ListArray.from_arrays(ends, pa.array(said.token_ids.astype(np.uint64)))
        table = {"input_ids": ids}
        for key, rows in columns.items():
            flat = np.concatenate(rows)
            inner = np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]
            table[key] = pa.ListArray.from_arrays(
                ends, pa.ListArray.from_arrays(inner, pa.array(flat.reshape(-1)))
            )
        pq.write_table(pa.table(table), folder / "data_0.parquet")

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        import torch

        compressor = self.compressor(said.logits.shape[1])
        keys = ("compressed_logprobs", "bytepacked_indices")

        def read() -> Stored:
            table = pq.read_table(folder / "data_0.parquet").combine_chunks()
            flat = {key: table[key].combine_chunks().flatten() for key in keys}
            packed = {
                key: torch.from_numpy(rows.flatten().to_numpy().reshape(len(rows), -1).copy())
                for key, rows in flat.items()
            }
            ids, logprobs = compressor.decompress_to_sparse(packed)
            return Stored(ids.numpy().astype(np.int32), logprobs.float().numpy())

        return read

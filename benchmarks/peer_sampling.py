"""Random sampling distillation as its paper describes it: unbiased samples of the teacher, not its top k.

Written here from the authors' poster and slides; they have published no code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard
from safetensors.numpy import load_file, save_file

from benchmarks.gradients import softmax
from benchmarks.peer_formats import Said, Stored, log_softmax, spread


@dataclass(frozen=True, slots=True)
class Sampled:
    """Random sampling distillation: `num_samples` tokens drawn with replacement, and how often each came up.

    An entry is 3 bytes, 18 bits of id and 6 of count; `with_logprobs` adds the token's log-probability as
    float16, which importance weights for other temperatures need.

    References:
        Anshumann et al. 2025, Sparse Logit Sampling, arXiv:2503.16870.
    """

    num_samples: int
    temperature: float
    with_logprobs: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """As the table shows it."""
        kept = ", weights" if self.with_logprobs else ""
        return f"RS-KD, {self.num_samples} samples at T = {self.temperature:g}{kept}"

    def draw(self, logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Token ids [m, num_samples] drawn from the softened teacher."""
        below = np.cumsum(softmax(logits.astype(np.float64), self.temperature), axis=1)
        below /= below[:, -1:]
        where = rng.random((len(logits), self.num_samples))
        return np.stack([np.searchsorted(b, w, side="right") for b, w in zip(below, where, strict=True)])

    def write(self, folder: Path, said: Said) -> None:
        if self.num_samples > 63 or said.logits.shape[1] > 1 << 18:
            raise ValueError(f"an entry holds 63 samples and 2^18 ids, found {self} and {said.logits.shape}")
        rng = np.random.default_rng(self.seed)
        unique: list[int] = []
        words: list[np.ndarray] = []
        kept: list[np.ndarray] = []
        for part in said.parts():
            logprobs = log_softmax(said.logits[part]) if self.with_logprobs else None
            for row, drawn in enumerate(self.draw(said.logits[part], rng)):
                ids, counts = np.unique(drawn, return_counts=True)
                unique.append(len(ids))
                words.append((ids | counts << 18).astype("<u4"))
                if logprobs is not None:
                    kept.append(logprobs[row, ids].astype(np.float16))
        entries = np.concatenate(words).view(np.uint8).reshape(-1, 4)[:, :3].copy()
        arrays = {"token_ids": said.token_ids, "unique": np.array(unique, np.uint8), "entries": entries}
        arrays |= {"logprobs": np.concatenate(kept)} if kept else {}
        save_file(arrays, folder / "samples.safetensors")

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        def read() -> Stored:
            arrays = load_file(folder / "samples.safetensors")
            words = np.zeros((len(arrays["entries"]), 4), np.uint8)
            words[:, :3] = arrays["entries"]
            flat = words.view("<u4")[:, 0]
            unique = arrays["unique"].astype(int)
            there = np.arange(unique.max()) < unique[:, None]
            ids, counts = np.zeros(there.shape, np.int32), np.zeros(there.shape, np.int32)
            ids[there], counts[there] = flat & (1 << 18) - 1, flat >> 18
            logprobs = np.full(there.shape, -np.inf, np.float32)
            logprobs[there] = arrays.get("logprobs", np.zeros(len(flat), np.float16))
            return Stored(ids, logprobs, counts)

        return read

    def shares(self, stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
        """Counts over samples: unbiased at the temperature of the samples, the only one it can be read at."""
        return spread(stored, stored.counts / self.num_samples, guessed)

    def weighted(self, stored: Stored, temperature: float, guessed: np.ndarray) -> np.ndarray:
        """Counts times p^(1/T) / p^(1/T of the samples), made to sum to 1: no normaliser is kept."""
        logprobs = np.where(stored.counts > 0, stored.logprobs, 0)
        with np.errstate(divide="ignore"):
            weight = np.log(stored.counts) + logprobs * (1 / temperature - 1 / self.temperature)
        return spread(stored, softmax(weight, 1), guessed)


@dataclass(frozen=True, slots=True)
class PackedSampled(Sampled):
    """The same samples packed as our own heads are: byte planes of ids by frequency, zstd level 1.

    Ids are numbered by how often they were drawn (the order is a sidecar) and ascend within a position, less
    the one before; counts are a plane, and so are how many entries a position has and the bytes of its input.
    """

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"RS-KD, {self.num_samples} samples at T = {self.temperature:g}, packed"

    def write(self, folder: Path, said: Said) -> None:
        rng = np.random.default_rng(self.seed)
        drawn = np.concatenate([self.draw(said.logits[part], rng) for part in said.parts()])
        order = np.argsort(-np.bincount(drawn.ravel(), minlength=said.logits.shape[1]), kind="stable")
        rank = np.argsort(order)
        found = [np.unique(row, return_counts=True) for row in rank[drawn]]
        steps = np.concatenate([np.diff(ids, prepend=0) for ids, _ in found])
        planes = {
            "unique": np.array([len(ids) for ids, _ in found]),
            "counts": np.concatenate([counts for _, counts in found]),
            **{f"step{i}": steps >> 8 * i & 255 for i in range(3)},
            **{f"token{i}": said.token_ids >> 8 * i & 255 for i in range(3)},
        }
        packed = {
            name: zstandard.compress(plane.astype(np.uint8).tobytes(), 1) for name, plane in planes.items()
        }
        arrays = {name: np.frombuffer(data, np.uint8) for name, data in packed.items()}
        save_file(arrays, folder / "samples.safetensors")
        np.save(folder / "sidecar-order.npy", order.astype(np.int32))

    def open(self, folder: Path, said: Said) -> Callable[[], Stored]:
        order = np.load(folder / "sidecar-order.npy")

        def read() -> Stored:
            arrays = load_file(folder / "samples.safetensors")
            planes = {
                name: np.frombuffer(zstandard.decompress(data.tobytes()), np.uint8).astype(np.int32)
                for name, data in arrays.items()
            }
            there = np.arange(planes["unique"].max()) < planes["unique"][:, None]
            steps, counts = np.zeros(there.shape, np.int32), np.zeros(there.shape, np.int32)
            steps[there] = sum(planes[f"step{i}"] << 8 * i for i in range(3))
            counts[there] = planes["counts"]
            ids = order[np.cumsum(steps, axis=1)]
            return Stored(ids, np.where(there, np.float32(0), np.float32(-np.inf)), counts)

        return read

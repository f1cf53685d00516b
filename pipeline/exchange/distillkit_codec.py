"""DistillKit's compression undone, in NumPy: bit-packed ids, exact values, polynomial, quantized residuals.

Written from DistillKit's own decoder and tested against its output. Polynomials are computed in the types
that it computes in, because residuals were taken from what those types give; the result is float32. (With
`normalize_t` in half precision its decoder and encoder round differently; this follows the encoder.)

References:
    DistillKit, distillkit/compression/{config,monotonic_logprobs,bitpack,legacy}.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.exchange.sequences import MAX_ENTRIES
from pmetal_distill.yaml_files import read_yaml
from schemas.errors import CacheError, UsageError
from schemas.spec import MAX_VOCAB_SIZE
from schemas.strict import Fields

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

FILE = "compression_config.yaml"
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_SPECIAL = {"sqrt": np.sqrt, "exp": np.exp}
_MAX_DEGREE = 32


@dataclass(frozen=True, slots=True)
class Bin:
    """Quantized residuals: a scale and `num_elements` integers of `bits` bits."""

    scale_dtype: str
    bits: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        """Bytes of scale and integers."""
        return _WIDTHS[self.scale_dtype] + -(-self.bits * self.num_elements // 8)


@dataclass(frozen=True, slots=True)
class Quantization:
    """`DistributionQuantizationConfig`: how one distribution is stored.

    Attributes:
        d, k, exact_k, exact_dtype, polynomial_terms, term_dtype, residual_bins, delta_encoding, normalize_t:
            as DistillKit names them.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[int | str, ...]
    term_dtype: str
    residual_bins: tuple[Bin, ...]
    delta_encoding: bool
    normalize_t: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the log-probabilities of a position."""
        exact = self.exact_k * _WIDTHS[self.exact_dtype]
        terms = len(self.polynomial_terms) * _WIDTHS[self.term_dtype]
        return exact + terms + sum(b.num_bytes for b in self.residual_bins)

    @property
    def exact(self) -> bool:
        """Whether float32 values were kept as they were."""
        return self.exact_k == self.k and _WIDTHS[self.exact_dtype] >= 4 and not self.delta_encoding

    def logprobs(self, packed: Bytes) -> Float32:
        """Log-probabilities float32 [n, k] of bytes [n, num_bytes]."""
        rows = _Reader(packed)
        exact = rows.floats(self.exact_k, self.exact_dtype)
        num_rest = self.k - self.exact_k
        rest = np.zeros((len(packed), num_rest))
        if self.polynomial_terms:
            coefficients = rows.floats(len(self.polynomial_terms), self.term_dtype)
            rest = self._polynomial(coefficients, num_rest)
        start = 0
        for part in self.residual_bins:
            scale = rows.floats(1, part.scale_dtype)
            rest[:, start : start + part.num_elements] += rows.integers(part) * scale
            start += part.num_elements
        values = np.concatenate([exact, rest], axis=1)
        return (np.cumsum(values, axis=1) if self.delta_encoding else values).astype(np.float32)

    def _polynomial(self, coefficients: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
        dtype = self.term_dtype
        points = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        points = rounded(points, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            columns = [
                _SPECIAL[term](points) if isinstance(term, str) else points**term
                for term in self.polynomial_terms
            ]
            terms = rounded(np.stack(columns, axis=1), dtype)
            return rounded(rounded(terms * coefficients[:, None, :], dtype).sum(axis=2), dtype)


@dataclass(frozen=True, slots=True)
class Legacy:
    """`LegacyLogitCompressionConfig`: exact values and a polynomial in the rank or its inverse."""

    vocab_size: int
    k: int
    exact_k: int
    polynomial_degree: int
    invert_polynomial: bool
    with_sqrt_term: bool

    @property
    def num_terms(self) -> int:
        """Coefficients of a position; none where all values are exact."""
        return self.polynomial_degree + 1 + self.with_sqrt_term if self.exact_k < self.k else 0

    def values(self, exact: npt.NDArray[Any], coefficients: npt.NDArray[Any]) -> Float32:
        """Logits up to a constant (or log-probabilities) float32 [n, k]."""
        if self.exact_k == self.k:
            return np.asarray(exact, np.float32)
        rank = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        sign = -1.0 if self.invert_polynomial else 1.0
        terms = [rank ** (sign * power) for power in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(rank)] if self.with_sqrt_term else []
        rest = np.asarray(coefficients, np.float64) @ np.stack(terms)
        return np.concatenate([exact, rest], axis=1).astype(np.float32)


def index_bits(vocab_size: int) -> int:
    """Bits of a packed id, as DistillKit computes them."""
    return math.ceil(float(np.log2(np.float32(vocab_size))))


def unpack_bytes(packed: Bytes, bits: int, count: int) -> Int64:
    """Integers int64 [n, count] of `bits` bits each, most significant bit first, from bytes [n, m]."""
    stream = np.unpackbits(packed, axis=1, count=bits * count).reshape(len(packed), count, bits)
    values = np.zeros((len(packed), count), np.int64)
    for bit in range(bits):
        values = values << 1 | stream[:, :, bit]
    return values


def unpack_words(words: npt.NDArray[Any], bits: int, count: int) -> Int64:
    """Integers int64 [n, count], several to a 64-bit word, the first in the lowest bits."""
    per_word = 64 // bits
    shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
    spread = words.astype(np.uint64)[:, :, None] >> shifts & np.uint64((1 << bits) - 1)
    return spread.reshape(len(words), -1)[:, :count].astype(np.int64)


def rounded(values: npt.NDArray[np.float64], dtype: str) -> npt.NDArray[np.float64]:
    """Values as a type of `dtype` holds them, round to nearest even."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64)
    return values.astype(dtype).astype(np.float64)


class _Reader:
    """Fields of packed rows, one after another."""

    def __init__(self, packed: Bytes) -> None:
        self._rest = packed

    def _take(self, count: int) -> Bytes:
        taken, self._rest = self._rest[:, :count], self._rest[:, count:]
        return np.ascontiguousarray(taken)

    def floats(self, count: int, dtype: str) -> npt.NDArray[np.float64]:
        raw = self._take(count * _WIDTHS[dtype])
        if dtype == "bfloat16":
            words = raw.view("<u2").astype(np.uint32) << np.uint32(16)
            return words.view(np.float32).astype(np.float64)
        return raw.view(np.dtype(dtype).newbyteorder("<")).astype(np.float64)

    def integers(self, part: Bin) -> npt.NDArray[np.float64]:
        raw = self._take(part.num_bytes - _WIDTHS[part.scale_dtype])
        values = unpack_bytes(raw, part.bits, part.num_elements).astype(np.float64)
        return values * 2 - 1 if part.bits == 1 else values - 2.0 ** (part.bits - 1)


def read_config(path: Path) -> Quantization | Legacy:
    """The compression in a YAML file: DistillKit's `compression_config.yaml` or a training configuration.

    Raises:
        UsageError: unreadable, or not such a configuration.
    """
    raw: Any = read_yaml(path)[0]
    raw = raw.get("teacher", raw) if isinstance(raw.get("teacher"), dict) else raw
    try:
        if raw.get("legacy_logit_compression") is not None or "polynomial_degree" in raw:
            return _legacy(Fields(raw.get("legacy_logit_compression", raw), where=str(path)))
        return _quantization(Fields(raw.get("logprob_compressor") or raw, where=str(path)))
    except CacheError as error:
        raise UsageError(f"{error}; give DistillKit's compression configuration") from error


def _quantization(fields: Fields) -> Quantization:
    k = fields.integer("k", 1, MAX_ENTRIES)
    exact_k = fields.integer("exact_k", 0, k)
    terms = fields.value("polynomial_terms") if fields.has("polynomial_terms") else None
    bins = fields.items("residual_bins", max_length=64)
    config = Quantization(
        d=fields.integer("d", 2, MAX_VOCAB_SIZE),
        k=k,
        exact_k=exact_k,
        exact_dtype=_dtype(fields, "exact_dtype"),
        polynomial_terms=tuple(_term(fields, term) for term in terms or ()),
        term_dtype=_dtype(fields, "term_dtype"),
        residual_bins=tuple(_bin(Fields(raw, where=f"{fields.where}: 'residual_bins'")) for raw in bins),
        delta_encoding=_flag(fields, "delta_encoding", default=True),
        normalize_t=_flag(fields, "normalize_t", default=False),
    )
    if sum(b.num_elements for b in config.residual_bins) > k - exact_k:
        fields.fail(f"residual bins of at most k - exact_k = {k - exact_k} elements", bins)
    return config


def _legacy(fields: Fields) -> Legacy:
    k = fields.integer("k", 1, MAX_ENTRIES)
    return Legacy(
        vocab_size=fields.integer("vocab_size", 2, MAX_VOCAB_SIZE),
        k=k,
        exact_k=fields.integer("exact_k", 0, k),
        polynomial_degree=fields.integer("polynomial_degree", 0, _MAX_DEGREE),
        invert_polynomial=_flag(fields, "invert_polynomial", default=True),
        with_sqrt_term=_flag(fields, "with_sqrt_term", default=False),
    )


def _bin(fields: Fields) -> Bin:
    bits = fields.integer("element_bits", 1, 32)
    return Bin(_dtype(fields, "scale_dtype"), bits, fields.integer("num_elements", 1, MAX_ENTRIES))


def _dtype(fields: Fields, key: str) -> str:
    return fields.choice(key, _WIDTHS) if fields.has(key) else "float32"


def _term(fields: Fields, term: object) -> int | str:
    if isinstance(term, str) and term in _SPECIAL:
        return term
    if type(term) is not int or not 0 <= term <= _MAX_DEGREE:
        fields.fail(f"polynomial terms from 0 to {_MAX_DEGREE}, 'sqrt' or 'exp'", term)
    return int(term)


def _flag(fields: Fields, key: str, *, default: bool) -> bool:
    value = fields.value(key) if fields.has(key) else default
    if not isinstance(value, bool):
        fields.fail(f"'{key}' true or false", value)
    return bool(value)

"""What entropy coding learns from a sample: which ids are frequent, how curve values follow one another.

An optional sidecar, shared by all shards of a cache. Measured on SmolLM2-135M and the Python documentation,
other documents than the sample: ids 25.1 -> 21.5, curve 6.0 -> 4.2 bytes a token. Size on disk: 4 V bytes.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from schemas.arrays import Int32, TargetArrays
from schemas.errors import CorruptionError, IncompatibleError
from schemas.grid import quantize_curve, quantize_logprobs
from schemas.spec import MAX_VOCAB_SIZE, TargetSpec
from schemas.tensors import dump_tensors, parse_tensors

Int64 = npt.NDArray[np.int64]

ONE = 1 << 16
MAX_WEIGHT = 1 << 24
MAX_CONSTANT = 1 << 40
_FORMAT = {"format": "pmetal-distill codebook", "version": "1"}


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """An order of the vocabulary and a predictor of the curve.

    Attributes:
        token_order: int32 [V], a permutation; code c on disk means token id `token_order[c]`.
        curve_predictor: int64 [m, m + 1] in units of 2^-16; the prediction of node j is
            `(p[j, 0] + sum_{i<j} p[j, 1 + i] * c[i]) >> 16`.

    Raises:
        IncompatibleError: not a permutation, or a predictor that looks ahead or is out of bounds.
    """

    token_order: Int32
    curve_predictor: Int64
    _codes: Int32 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_order", np.ascontiguousarray(self.token_order, np.int32))
        object.__setattr__(self, "curve_predictor", np.ascontiguousarray(self.curve_predictor, np.int64))
        order, predictor = self.token_order, self.curve_predictor
        if order.ndim != 1 or not 2 <= len(order) <= MAX_VOCAB_SIZE or not _is_permutation(order):
            raise IncompatibleError("Codebook: token_order must be a permutation of the vocabulary")
        if predictor.ndim != 2 or predictor.shape[1] != predictor.shape[0] + 1 or not _is_causal(predictor):
            raise IncompatibleError(
                "Codebook: curve_predictor must be [m, m+1], bounded, and never look ahead"
            )
        codes = np.empty_like(order)
        codes[order] = np.arange(len(codes), dtype=np.int32)
        object.__setattr__(self, "_codes", codes)

    @staticmethod
    def fit(targets: TargetArrays, spec: TargetSpec) -> "Codebook":
        """The codebook of a sample of trained (unmasked) tokens [n], spread over the data set.

        Ids go by their frequency in the heads, ties by id; the predictor is least squares on rounded curves.
        """
        counts = np.bincount(targets.head_ids.ravel(), minlength=spec.vocab_size)
        order = np.lexsort((np.arange(spec.vocab_size), -counts)).astype(np.int32)
        if len(targets.head_ids) < 8 * (spec.num_nodes + 1):
            return Codebook(order, plain_predictor(spec.num_nodes))
        steps = quantize_logprobs(targets.head_logprobs, spec)[0]
        curve = quantize_curve(targets, steps, spec)[0]
        return Codebook(order, _fit_predictor(curve))

    @property
    def token_codes(self) -> Int32:
        """int32 [V], the inverse of `token_order`."""
        return self._codes

    def fits(self, spec: TargetSpec) -> bool:
        """Whether the shapes are those of `spec`."""
        return len(self.token_order) == spec.vocab_size and len(self.curve_predictor) == spec.num_nodes

    def to_bytes(self) -> bytes:
        """The sidecar file; equal codebooks give equal bytes."""
        return dump_tensors(
            {"token_order": self.token_order, "curve_predictor": self.curve_predictor}, dict(_FORMAT)
        )

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> "Codebook":
        """The codebook in a sidecar file.

        Raises:
            CorruptionError: anything but the two tensors with fitting shapes, types and values.
        """
        tensors, metadata = parse_tensors(data, where=where)
        kinds = {name: (a.dtype.str[1:], a.ndim) for name, a in tensors.items()}
        wanted = {"token_order": ("i4", 1), "curve_predictor": ("i8", 2)}
        if kinds != wanted or metadata != _FORMAT:
            raise CorruptionError(f"{where}: must hold tensors {wanted} and say {_FORMAT}, found {kinds}")
        try:
            return Codebook(tensors["token_order"], tensors["curve_predictor"])
        except IncompatibleError as error:
            raise CorruptionError(f"{where}: {error}") from error


def plain_predictor(num_nodes: int) -> Int64:
    """int64 [m, m + 1]: each node predicted by the one before it, the first by 0; used without a codebook."""
    predictor = ONE * np.eye(num_nodes, num_nodes + 1, dtype=np.int64)
    predictor[:1, :1] = 0
    return predictor


def predict_node(curve: Int32, node: int, predictor: Int64) -> Int64:
    """Predictions int64 [n] of one node from the nodes before it in `curve`, int32 [n, m]."""
    weights = predictor[node, 1 : 1 + node]
    return np.asarray((curve[:, :node] @ weights + predictor[node, 0]) >> 16, np.int64)


def _is_permutation(order: Int32) -> bool:
    inside = order.min() >= 0 and order.max() < len(order)
    return bool(inside and (np.bincount(order, minlength=len(order)) == 1).all())


def _is_causal(predictor: Int64) -> bool:
    weights = predictor[:, 1:]
    bounded = (np.abs(weights) <= MAX_WEIGHT).all() and (np.abs(predictor[:, 0]) <= MAX_CONSTANT).all()
    return bool(bounded and not np.triu(weights).any())


def _fit_predictor(curve: Int32) -> Int64:
    num_nodes = curve.shape[1]
    predictor = np.zeros((num_nodes, num_nodes + 1), np.int64)
    features = np.column_stack([np.ones(len(curve)), curve]).astype(np.float64)
    for node in range(num_nodes):
        past = features[:, : node + 1]
        weights = np.linalg.lstsq(past, features[:, node + 1], rcond=1e-9)[0]
        predictor[node, : node + 1] = np.clip(np.rint(weights * ONE), -MAX_WEIGHT, MAX_WEIGHT)
        residual = curve[:, node] * ONE - past[:, 1:] @ predictor[node, 1 : node + 1]
        predictor[node, 0] = np.rint(np.median(residual)) + ONE // 2
    return predictor

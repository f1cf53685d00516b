"""Targets to Parquet columns and back, one row a token, without a Python loop over tokens.

Integers are byte planes (see `layout`), heads are in logit order, so that a smaller k is a prefix. Cost per
token on one core: `python benchmarks/codec.py`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrays import Bool, Float32, Int32, TargetArrays, TokenRows
from schemas.basis import SketchBasis
from schemas.codebook import Codebook, plain_predictor, predict_node
from schemas.coordinates import decode_coordinates, encode_coordinates
from schemas.errors import CorruptionError, IncompatibleError, NonFiniteError
from schemas.grid import (
    TOP_STEP,
    masked_zero,
    quantize_curve,
    quantize_logprobs,
    top_logprob,
    truncate_head,
)
from schemas.layout import (
    MAX_GROUP_BYTES,
    id_planes,
    needed_columns,
    row_bytes,
    target_schema,
)
from schemas.planes import Planes, from_column, join_planes, split_planes, to_column
from schemas.spec import TargetSpec

CURVE_BIAS = 128


@dataclass(frozen=True, slots=True)
class Saturation:
    """Values that did not fit their range and were clipped, of how many tokens.

    Attributes:
        tokens: trained tokens encoded.
        logprobs, curve, coordinates: clipped values.
    """

    tokens: int = 0
    logprobs: int = 0
    curve: int = 0
    coordinates: int = 0

    def __add__(self, other: "Saturation") -> "Saturation":
        return Saturation(
            self.tokens + other.tokens,
            self.logprobs + other.logprobs,
            self.curve + other.curve,
            self.coordinates + other.coordinates,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Codec:
    """Everything needed to read or write the targets of one shard.

    Attributes:
        spec: the stored layout.
        basis: the sketch basis; exactly when `spec.tail` is "sketch".
        codebook: learned entropy coding; None means ids as they are and plain differences.

    Raises:
        IncompatibleError: basis or codebook of another vocabulary or tail mode.
    """

    spec: TargetSpec
    basis: SketchBasis | None = None
    codebook: Codebook | None = None

    def __post_init__(self) -> None:
        if (self.basis is not None) != (self.spec.tail == "sketch"):
            found = "none" if self.basis is None else "one"
            raise IncompatibleError(f"Codec: a basis must come with tail 'sketch' only, found {found}")
        if self.basis and self.basis.vocab_size != self.spec.vocab_size:
            found = str(self.basis.vocab_size)
            raise IncompatibleError(f"Codec: basis must have V={self.spec.vocab_size}, found V={found}")
        if self.codebook and not self.codebook.fits(self.spec):
            raise IncompatibleError("Codec: codebook must have the vocabulary and curve nodes of the spec")

    @property
    def rank(self) -> int:
        """Stored sketch coordinates."""
        return self.basis.rank if self.basis else 0

    @property
    def predictor(self) -> npt.NDArray[np.int64]:
        """The predictor of the curve's nodes, int64 [m, m + 1]."""
        return self.codebook.curve_predictor if self.codebook else plain_predictor(self.spec.num_nodes)

    @property
    def schema(self) -> pa.Schema:
        """Columns of the shard."""
        return target_schema(self.spec, self.basis)

    @property
    def row_bytes(self) -> int:
        """Bytes that a token takes unpacked and decoded together; what a row group may take is limited."""
        return row_bytes(self.schema) + 4 * (1 + 2 * self.spec.k + self.spec.num_nodes + self.rank)

    def columns(self, *, rank: int | None = None) -> list[str]:
        """Columns that `decode` needs for the leading `rank` coordinates."""
        return needed_columns(self.schema, self.basis, rank)


def encode(
    targets: TargetArrays, rows: TokenRows, codec: Codec, *, predicted: bool = False
) -> tuple[pa.Table, Saturation]:
    """Parquet columns of `n` tokens.

    Args:
        targets: leading shape [n]; log-probabilities and curve as captured, that is, exact: the curve
            is relative to the exact smallest head logit and is shifted to the decoded one here.
        rows: the same tokens; targets of rows outside the loss mask are ignored and stored as zeros.
        codec: layout and sidecars.
        predicted: the coordinates lack what the basis' predictor says already.

    Returns:
        the table and what was clipped.

    Raises:
        IncompatibleError: shapes that do not fit the codec, ids outside the vocabulary, more rows than a
            reader takes at once.
        NonFiniteError: NaN or infinity in a trained row.
    """
    _check_input(targets, rows, codec)
    spec, mask = codec.spec, rows.loss_mask
    columns = _id_columns(targets, rows, codec)
    steps, clipped_logprobs = quantize_logprobs(_trained(targets.head_logprobs, mask), spec)
    if spec.tail == "none":
        top = np.rint(-targets.head_logprobs[:, :1] / TOP_STEP)
        columns |= _pair("top", masked_zero(np.clip(top, 0, 65535).astype(np.int32), mask))
    if spec.k > 1:
        columns |= _pair("gap", np.diff(steps, axis=1))
    clipped_curve = clipped_coordinates = 0
    if spec.num_nodes:
        curve, clipped_curve = quantize_curve(_zero_rows(targets, mask), steps, spec)
        columns |= _pair("crv", masked_zero(_curve_residuals(curve, codec), mask))
    if codec.basis:
        head_ids = masked_zero(targets.head_ids, mask)
        packed, clipped_coordinates = encode_coordinates(
            targets.coordinates, rows, head_ids, codec.basis, predicted=predicted
        )
        columns |= packed
    table = _to_table(columns, rows, codec.schema)
    return table, Saturation(int(mask.sum()), clipped_logprobs, clipped_curve, clipped_coordinates)


def decode(
    table: pa.Table, codec: Codec, *, k: int | None = None, rank: int | None = None
) -> tuple[TokenRows, TargetArrays]:
    """The tokens in a table that `encode` made, in the same order.

    Args:
        table: the columns `codec.columns(rank=rank)`, or more.
        codec: layout and sidecars of the shard.
        k: keep this many head entries, the others join the tail; None keeps all.
        rank: keep this many leading coordinates, 0 for none; None keeps all.

    Raises:
        CorruptionError: columns or values that `encode` never writes.
        IncompatibleError: `k` or `rank` beyond what is stored.
    """
    spec = codec.spec
    rank = codec.rank if rank is None else rank
    if not 0 <= rank <= codec.rank:
        raise IncompatibleError(f"decode: rank must be from 0 to the stored {codec.rank}, found {rank}")
    kept = spec.with_k(spec.k if k is None else k).k
    _check_columns(table, codec, rank)
    planes = {
        f.name: from_column(table.column(f.name))
        for f in table.schema
        if pa.types.is_fixed_size_binary(f.type)
    }
    rows = _decode_rows(table, planes, spec)
    mask = rows.loss_mask
    head_ids = _decode_ids(planes, codec)
    relative, curve = _decode_head(planes, codec)
    if spec.tail == "none":
        top = -TOP_STEP * _joined(planes, "top")[:, 0].astype(np.float32)
    else:
        top = top_logprob(relative, curve[:, spec.curve_nodes.index(1.0)])
    coordinates = np.empty((len(rows), 0), np.float32)
    if codec.basis and rank:
        coordinates = decode_coordinates(planes, codec.basis, rank, rows.token_ids, head_ids)
    targets = TargetArrays(head_ids, relative + top[:, None], curve, coordinates)
    targets = truncate_head(targets, spec, kept)
    masked = np.flatnonzero(~mask)
    for part in targets.parts():
        part[masked] = 0
    return rows, targets


def _check_input(targets: TargetArrays, rows: TokenRows, codec: Codec) -> None:
    spec, n = codec.spec, len(rows)
    wanted = ((n, spec.k), (n, spec.k), (n, spec.num_nodes), (n, codec.rank))
    if n * codec.row_bytes > MAX_GROUP_BYTES:
        must = f"a row group must unpack to at most {MAX_GROUP_BYTES} bytes"
        raise IncompatibleError(f"encode: {must}, found {n} rows of {codec.row_bytes}; use shorter sequences")
    if targets.shapes() != wanted:
        raise IncompatibleError(f"encode: arrays must have shapes {wanted}, found {targets.shapes()}")
    for name, array in (
        ("head_logprobs", targets.head_logprobs),
        ("tail_curve", targets.tail_curve),
        ("coordinates", targets.coordinates),
    ):
        finite = np.isfinite(array)
        if not finite.all() and (bad := ~finite.all(axis=1) & rows.loss_mask).any():
            row = int(bad.argmax())
            raise NonFiniteError(f"{_place(rows, row)}: {name} must be finite, found {array[row][:8]}")
    falling = (np.diff(targets.head_logprobs, axis=1) <= 0).all(axis=1) | ~rows.loss_mask
    if not falling.all():
        row = int(falling.argmin())
        found = targets.head_logprobs[row][:8]
        raise IncompatibleError(f"{_place(rows, row)}: head_logprobs must not rise, found {found}")
    for name, ids in (("token_ids", rows.token_ids), ("head_ids", targets.head_ids[rows.loss_mask])):
        if ids.size and not (ids.min() >= 0 and ids.max() < spec.vocab_size):
            found = f"{ids.min()}..{ids.max()}"
            raise IncompatibleError(f"encode: {name} must be below V={spec.vocab_size}, found {found}")


def _place(rows: TokenRows, row: int) -> str:
    sequence = rows.sequences[row]
    token = int((rows.sequences[:row] == sequence).sum())
    return f"encode row {row} (sequence {sequence}, token {token})"


def _trained(values: npt.NDArray[np.float32], mask: Bool) -> Float32:
    return values if mask.all() else np.where(mask[:, None], values, np.float32(0))


def _zero_rows(targets: TargetArrays, mask: Bool) -> TargetArrays:
    """Head and curve with zeros outside the mask."""
    ids, logprobs, curve = targets.head_ids, targets.head_logprobs, targets.tail_curve
    if not mask.all():
        ids, logprobs, curve = masked_zero(ids, mask), _trained(logprobs, mask), _trained(curve, mask)
    return TargetArrays(ids, logprobs, curve, targets.coordinates[:, :0])


def _id_columns(targets: TargetArrays, rows: TokenRows, codec: Codec) -> dict[str, Planes]:
    """Planes of the input ids as they are and of the head's ids, coded if there is a codebook."""
    mask, codes, num_planes = rows.loss_mask, targets.head_ids, id_planes(codec.spec.vocab_size)
    if codec.codebook:
        codes = codec.codebook.token_codes[codes * mask[:, None]]
    columns = {f"tok{i}": p for i, p in enumerate(split_planes(rows.token_ids[:, None], num_planes))}
    return columns | {f"id{i}": p for i, p in enumerate(split_planes(masked_zero(codes, mask), num_planes))}


def _pair(name: str, values: Int32) -> dict[str, Planes]:
    low, high = split_planes(values, 2)
    return {f"{name}0": low, f"{name}1": high}


def _joined(planes: dict[str, Planes], name: str) -> Int32:
    return join_planes([planes[f"{name}0"], planes[f"{name}1"]])


def _curve_residuals(curve: Int32, codec: Codec) -> Int32:
    predicted = [predict_node(curve, node, codec.predictor) for node in range(curve.shape[1])]
    return (curve - np.stack(predicted, axis=1) + CURVE_BIAS).astype(np.int32)


def _to_table(columns: dict[str, Planes], rows: TokenRows, schema: pa.Schema) -> pa.Table:
    arrays = {name: to_column(plane) for name, plane in columns.items()}
    arrays["seq"] = pa.array(rows.sequences, pa.int32())
    arrays["doc"] = pa.array(rows.documents, pa.int32())
    arrays["msk"] = pa.array(rows.loss_mask, pa.bool_())
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _check_columns(table: pa.Table, codec: Codec, rank: int) -> None:
    schema = codec.schema
    for name in codec.columns(rank=rank):
        index = table.schema.get_field_index(name)
        if index < 0 or table.schema.field(index).type != schema.field(name).type:
            found = "none" if index < 0 else str(table.schema.field(index).type)
            raise CorruptionError(f"decode: column '{name}' must be {schema.field(name).type}, found {found}")
        if table.column(index).null_count:
            raise CorruptionError(f"decode: column '{name}' must not hold nulls")


def _decode_rows(table: pa.Table, planes: dict[str, Planes], spec: TargetSpec) -> TokenRows:
    token_ids = join_planes([planes[f"tok{i}"] for i in range(id_planes(spec.vocab_size))])[:, 0]
    _check_ids(token_ids, spec, "input")
    sequences, documents, mask = (table.column(name).to_numpy() for name in ("seq", "doc", "msk"))
    return TokenRows(token_ids, sequences, documents, mask)


def _check_ids(ids: Int32, spec: TargetSpec, what: str) -> None:
    if ids.size and ids.max() >= spec.vocab_size:
        raise CorruptionError(f"decode: {what} ids must be below V={spec.vocab_size}, found {ids.max()}")


def _decode_ids(planes: dict[str, Planes], codec: Codec) -> Int32:
    codes = join_planes([planes[f"id{i}"] for i in range(id_planes(codec.spec.vocab_size))])
    _check_ids(codes, codec.spec, "head")
    return codec.codebook.token_order.take(codes) if codec.codebook else codes


def _decode_head(planes: dict[str, Planes], codec: Codec) -> tuple[Float32, Float32]:
    """Log-probabilities relative to the top one, and the curve."""
    spec = codec.spec
    num_tokens = len(planes["id0"])
    relative = np.zeros((num_tokens, spec.k), np.float32)
    if spec.k > 1:
        steps = np.cumsum(_joined(planes, "gap"), axis=1, dtype=np.int32)
        np.multiply(steps, np.float32(-spec.logprob_step), out=relative[:, 1:])
    if not spec.num_nodes:
        return relative, np.zeros((num_tokens, 0), np.float32)
    residuals = _joined(planes, "crv") - CURVE_BIAS
    curve = np.zeros_like(residuals)
    predictor = codec.predictor
    for node in range(spec.num_nodes):
        value = predict_node(curve, node, predictor) + residuals[:, node]
        curve[:, node] = value.astype(np.int16)
    return relative, curve * np.float32(spec.curve_step)

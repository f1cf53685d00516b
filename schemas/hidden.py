"""Hidden states as Parquet columns and back: their own shard family, the same rows as the target shard.

Bytes per token and layer at width 576: 594 as int8 with a float16 scale for each 64 values, before zstd.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrays import Bool, Float32
from schemas.errors import CorruptionError, IncompatibleError, NonFiniteError
from schemas.hidden_spec import HiddenSpec
from schemas.layout import MAX_GROUP_BYTES
from schemas.planes import Planes, from_column, to_column
from schemas.tensors import dump_tensors, parse_tensors

MAX_FLOAT16 = 65504.0
_FORMAT = {"format": "pmetal-distill hidden basis", "version": "1"}

Layers = dict[int, Float32]


@dataclass(frozen=True, slots=True, eq=False)
class HiddenBasis:
    """PCA of each stored layer: state = mean + components @ coordinates.

    Attributes:
        mean: float32 [layers, d].
        components: float32 [layers, d, r], orthonormal columns; rounded to float16 on construction.

    Raises:
        IncompatibleError: shapes that do not fit or values that are not finite in float16.
    """

    mean: Float32
    components: Float32

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            rounded = np.asarray(self.components, np.float16).astype(np.float32)
        object.__setattr__(self, "components", rounded)
        object.__setattr__(self, "mean", np.ascontiguousarray(self.mean, np.float32))
        if rounded.ndim != 3 or self.mean.shape != rounded.shape[:2]:
            found = f"{self.mean.shape}, {rounded.shape}"
            raise IncompatibleError(f"HiddenBasis: must be [layers, d] and [layers, d, r], found {found}")
        if not (np.isfinite(self.mean).all() and np.isfinite(rounded).all()):
            raise IncompatibleError("HiddenBasis: values must be finite in float16")

    @staticmethod
    def fit(states: Layers, spec: HiddenSpec) -> "HiddenBasis":
        """PCA of a sample of hidden states, each layer float32 [n, d], to `spec.rank` coordinates."""
        means, components = [], []
        for layer in spec.layers:
            sample = states[layer].astype(np.float64)
            mean = sample.mean(axis=0)
            centred = sample - mean
            vectors = np.linalg.eigh(centred.T @ centred)[1]
            means.append(mean)
            components.append(vectors[:, ::-1][:, : spec.rank])
        return HiddenBasis(np.stack(means), np.stack(components))

    def fits(self, spec: HiddenSpec) -> bool:
        """Whether the shapes are those of `spec`."""
        return self.components.shape == (len(spec.layers), spec.hidden_size, spec.rank)

    def to_bytes(self) -> bytes:
        """The sidecar file."""
        return dump_tensors(
            {"mean": self.mean, "components": self.components.astype(np.float16)}, dict(_FORMAT)
        )

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> "HiddenBasis":
        """The basis in a sidecar file.

        Raises:
            CorruptionError: anything but the two tensors with fitting shapes, types and values.
        """
        tensors, metadata = parse_tensors(data, where=where)
        kinds = {name: (a.dtype.str[1:], a.ndim) for name, a in tensors.items()}
        wanted = {"mean": ("f4", 2), "components": ("f2", 3)}
        if kinds != wanted or metadata != _FORMAT:
            raise CorruptionError(f"{where}: must hold tensors {wanted} and say {_FORMAT}, found {kinds}")
        try:
            return HiddenBasis(tensors["mean"], tensors["components"])
        except IncompatibleError as error:
            raise CorruptionError(f"{where}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class HiddenCodec:
    """Everything needed to read or write the hidden states of one shard.

    Raises:
        IncompatibleError: a basis without a rank, a rank without a basis, or shapes that differ.
    """

    spec: HiddenSpec
    basis: HiddenBasis | None = None

    def __post_init__(self) -> None:
        if (self.basis is not None) != (self.spec.rank > 0):
            raise IncompatibleError(
                f"HiddenCodec: a basis must come with rank > 0 only, rank is {self.spec.rank}"
            )
        if self.basis and not self.basis.fits(self.spec):
            found = self.basis.components.shape
            raise IncompatibleError(f"HiddenCodec: basis must fit layers, width and rank, found {found}")

    @property
    def schema(self) -> pa.Schema:
        """Columns of the shard: `h<layer>` and, for int8, `s<layer>`; none of them nullable."""
        return pa.schema(
            [
                pa.field(n, pa.binary(w), nullable=False)
                for n, w in _widths(self.spec, self.spec.layers).items()
            ]
        )

    def columns(self, layers: tuple[int, ...]) -> list[str]:
        """Columns that `decode_hidden` needs for these layers.

        Raises:
            IncompatibleError: a layer that is not stored.
        """
        if missing := sorted(set(layers) - set(self.spec.layers)):
            raise IncompatibleError(
                f"hidden layers: must be among the stored {self.spec.layers}, found {missing}"
            )
        return list(_widths(self.spec, layers))


def encode_hidden(states: Layers, loss_mask: Bool, codec: HiddenCodec) -> pa.Table:
    """Parquet columns of hidden states, each layer [n, d]; rows outside the mask are stored as zeros.

    int8: within each group of values, `value = q * scale` with `scale = max|value| / 127` in float16, rounded
    up, so the error is at most scale / 2. float16: nearest.

    Raises:
        IncompatibleError: layers or widths that are not those of the codec, more rows than a reader takes.
        NonFiniteError: NaN or infinity (or beyond float16) in a trained row.
    """
    if len(loss_mask) * codec.spec.row_bytes > MAX_GROUP_BYTES:
        must = f"a layer of a row group must unpack to at most {MAX_GROUP_BYTES} bytes"
        raise IncompatibleError(f"encode_hidden: {must}, found {len(loss_mask)} rows; use shorter sequences")
    columns: dict[str, Planes] = {}
    for index, layer in enumerate(codec.spec.layers):
        if layer not in states or states[layer].shape != (len(loss_mask), codec.spec.hidden_size):
            found = states[layer].shape if layer in states else "none"
            wanted = (len(loss_mask), codec.spec.hidden_size)
            raise IncompatibleError(f"encode_hidden: layer {layer} must have shape {wanted}, found {found}")
        values = np.where(loss_mask[:, None], states[layer], np.float32(0)).astype(np.float32)
        bad = ~(np.abs(values).max(axis=1) <= MAX_FLOAT16)
        if bad.any():
            row = int(bad.argmax())
            raise NonFiniteError(f"hidden layer {layer} row {row}: values must be finite in float16")
        if codec.basis:
            values = (values - codec.basis.mean[index]) @ codec.basis.components[index]
            values[~loss_mask] = 0
        columns |= dict(zip(_names(codec.spec, layer), _encode_layer(values, codec.spec), strict=True))
    return pa.table([to_column(plane) for plane in columns.values()], schema=codec.schema)


def decode_hidden(table: pa.Table, codec: HiddenCodec, layers: tuple[int, ...]) -> Layers:
    """float32 [n, d] for each of the layers; masked rows come back as zeros (as the mean with a basis).

    Raises:
        CorruptionError: columns that `encode_hidden` never writes.
        IncompatibleError: a layer that is not stored.
    """
    wanted = codec.columns(layers)
    for name in wanted:
        index = table.schema.get_field_index(name)
        kind = codec.schema.field(name).type
        if index < 0 or table.schema.field(index).type != kind or table.column(index).null_count:
            raise CorruptionError(
                f"decode_hidden: column '{name}' must be {kind} without nulls, found another"
            )
    states = {}
    for layer in layers:
        planes = [from_column(table.column(name)) for name in _names(codec.spec, layer)]
        values = _decode_layer(planes, codec.spec)
        if codec.basis:
            index = codec.spec.layers.index(layer)
            values = values @ codec.basis.components[index].T + codec.basis.mean[index]
        states[layer] = values
    return states


def _names(spec: HiddenSpec, layer: int) -> tuple[str, ...]:
    return (f"h{layer}", f"s{layer}") if spec.num_scales else (f"h{layer}",)


def _widths(spec: HiddenSpec, layers: tuple[int, ...]) -> dict[str, int]:
    values = spec.width if spec.num_scales else 2 * spec.width
    return {
        name: width
        for layer in layers
        for name, width in zip(_names(spec, layer), (values, 2 * spec.num_scales), strict=False)
    }


def _encode_layer(values: Float32, spec: HiddenSpec) -> tuple[Planes, ...]:
    if not spec.num_scales:
        return (_as_bytes(np.clip(values, -MAX_FLOAT16, MAX_FLOAT16).astype("<f2")),)
    grouped = _grouped(values, spec)
    exact = np.abs(grouped).max(axis=2) / 127
    scales = exact.astype("<f2")
    low = scales.astype(np.float32) < exact
    scales[low] = np.nextafter(scales[low], np.float16(np.inf))
    divisor = np.where(scales > 0, scales, np.float16(1)).astype(np.float32)
    quantized = np.rint(grouped / divisor[:, :, None]).astype(np.int8)
    quantized = quantized.reshape(len(values), -1)[:, : spec.width]
    return np.ascontiguousarray(quantized).view(np.uint8), _as_bytes(scales)


def _decode_layer(planes: list[Planes], spec: HiddenSpec) -> Float32:
    if not spec.num_scales:
        values = np.ascontiguousarray(planes[0]).view("<f2").astype(np.float32)
        if not np.isfinite(values).all():
            raise CorruptionError("decode_hidden: float16 values must be finite, found NaN or infinity")
        return values
    scales = np.ascontiguousarray(planes[1]).view("<f2").astype(np.float32)
    if not np.isfinite(scales).all():
        raise CorruptionError("decode_hidden: scales must be finite, found NaN or infinity")
    values = planes[0].view(np.int8).astype(np.float32)
    repeated = np.repeat(scales, spec.group_size, axis=1)[:, : spec.width]
    return np.asarray(np.multiply(values, repeated, out=values), np.float32)


def _grouped(values: Float32, spec: HiddenSpec) -> npt.NDArray[np.float32]:
    padded = np.pad(values, ((0, 0), (0, spec.num_scales * spec.group_size - spec.width)))
    return padded.reshape(len(values), spec.num_scales, spec.group_size)


def _as_bytes(values: npt.NDArray[np.float16]) -> Planes:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)

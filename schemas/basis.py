"""The sketch's basis: a sidecar file shared by many shards, named by the hash of its bytes.

Tail logits of a token are `mean + components @ y`, cut at a ceiling (see `tail`). On disk: V x (2 r + 4)
bytes (78 MB at V=152k, r=256).
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, Int32
from schemas.errors import CorruptionError, IncompatibleError
from schemas.predictor import SUBSTEPS, PredictorTables, SketchPredictor
from schemas.spec import MAX_VOCAB_SIZE
from schemas.strict import Fields, parse_object
from schemas.tensors import Arrays, dump_tensors, parse_tensors

LEVELS = (3, 5, 15, 255, 65536)
MAX_RANK = 4096
MAX_GROUPS = 64
MAX_META_BYTES = 1 << 16
MIN_DEVIATIONS = 3.1
NO_CEILING = 1e9
MIN_STEP, MAX_STEP = 1e-6, 1e6
_FORMAT = {"format": "pmetal-distill basis", "version": "1"}
_TENSORS = {
    "mean": ("f4", 1),
    "components": ("f2", 2),
    "step": ("f8", 1),
    "groups": ("i4", 2),
    "margin": ("f4", 1),
}
_PREDICTOR_TENSORS = {
    "predictor_head": ("f4", 2),
    "predictor_token": ("f4", 2),
    "predictor_constant": ("f4", 1),
}
_MAKING_TABLES = threading.Lock()


@dataclass(frozen=True, slots=True)
class CoordinateGroup:
    """Coordinates [start, stop) that share a number of levels, hence a packing into bytes.

    Attributes:
        start, stop: range of coordinates.
        levels: 65536 (two bytes each), 255 (one), 15 (two a byte), 5 (three a byte) or 3 (five a byte).
    """

    start: int
    stop: int
    levels: int

    @property
    def largest(self) -> int:
        """Coordinates saturate at this multiple of the step, either sign."""
        return 32767 if self.levels == 65536 else self.levels // 2


@dataclass(frozen=True, slots=True, eq=False)
class SketchBasis:
    """How coordinates become tail logits, and how they are rounded and packed.

    Attributes:
        mean: float32 [V].
        components: float32 [V, r]; rounded to float16 on construction, as they are stored.
        step: one quantization step for all coordinates, 1e-6 to 1e6.
        groups: cover coordinates 0..r in order, without gaps.
        meta: short strings for people: how it was fitted.
        margin: how far below the smallest head logit tail logits are cut, nats; rounded to float32.
            `NO_CEILING` or more leaves them as they are.
        predictor: of coordinates from token ids; None predicts 0.

    Raises:
        IncompatibleError: shapes that do not fit, values that are not finite in float16, bad groups.
    """

    mean: Float32
    components: Float32
    step: float
    groups: tuple[CoordinateGroup, ...]
    meta: dict[str, str] = field(default_factory=dict)
    margin: float = NO_CEILING
    predictor: SketchPredictor | None = None
    _tables: dict[int, PredictorTables] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            rounded = np.asarray(self.components, np.float16).astype(np.float32)
        object.__setattr__(self, "components", rounded)
        object.__setattr__(self, "mean", np.ascontiguousarray(self.mean, np.float32))
        self._settle(self._problem_of_arrays())

    def _settle(self, problem: str | None = None) -> None:
        """Rounds and checks what is cheap to check."""
        object.__setattr__(self, "groups", tuple(self.groups))
        with np.errstate(over="ignore"):
            object.__setattr__(self, "margin", float(np.float32(self.margin)))
        if problem := problem or self._problem():
            raise IncompatibleError(f"SketchBasis: {problem}")

    def _changed(self, **changes: Any) -> "SketchBasis":
        """The same arrays, which need no second look (0.15 s at V=49k, r=256), with other fields."""
        basis = object.__new__(SketchBasis)
        for known in fields(SketchBasis):
            object.__setattr__(basis, known.name, changes.get(known.name, getattr(self, known.name)))
        basis._settle()
        return basis

    def _problem_of_arrays(self) -> str | None:
        if self.components.ndim != 2 or self.mean.shape != self.components.shape[:1]:
            return f"mean [V], components [V, r], found {self.mean.shape}, {self.components.shape}"
        if not (2 <= self.vocab_size <= MAX_VOCAB_SIZE and 1 <= self.rank <= MAX_RANK):
            return f"2 <= V <= {MAX_VOCAB_SIZE}, 1 <= r <= {MAX_RANK}, found {self.components.shape}"
        if not (np.isfinite(self.mean).all() and np.isfinite(self.components).all()):
            return "mean and components must be finite (components in float16)"
        return None

    def _problem(self) -> str | None:
        if not MIN_STEP <= self.step <= MAX_STEP:
            return f"step must be from {MIN_STEP:g} to {MAX_STEP:g}, found {self.step}"
        if not np.isfinite(self.margin):
            return f"margin must be finite in float32, found {self.margin}"
        if self.predictor is not None and self.predictor.rank != self.rank:
            return f"predictor must have rank {self.rank}, found {self.predictor.rank}"
        starts = (0, *(g.stop for g in self.groups))
        ordered = all(
            g.start == s < g.stop and g.levels in LEVELS for g, s in zip(self.groups, starts, strict=False)
        )
        if not ordered or starts[-1] != self.rank or len(self.groups) > MAX_GROUPS:
            return f"groups must cover 0..{self.rank} in order with levels {LEVELS}, found {self.groups[:8]}"
        return None

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.components.shape[0])

    @property
    def rank(self) -> int:
        """r, coordinates per token."""
        return int(self.components.shape[1])

    @property
    def has_ceiling(self) -> bool:
        """Whether tail logits are cut at all."""
        return self.margin < NO_CEILING

    @property
    def centre(self) -> tuple[float, npt.NDArray[np.float64]]:
        """Means over the vocabulary: of `mean`, and of each column of `components`, float64 [r]."""
        return float(self.mean.mean(dtype=np.float64)), self.components.mean(axis=0, dtype=np.float64)

    def truncated(self, rank: int) -> "SketchBasis":
        """The basis of the first `rank` coordinates, to rebuild logits with.

        It has no predictor: one needs all columns, so decoding takes the whole basis and a `rank`.

        Raises:
            IncompatibleError: `rank` is not from 1 to the stored rank.
        """
        if not 1 <= rank <= self.rank:
            raise IncompatibleError(
                f"SketchBasis: rank must be from 1 to the stored {self.rank}, found {rank}"
            )
        groups = tuple(
            CoordinateGroup(g.start, min(g.stop, rank), g.levels) for g in self.groups if g.start < rank
        )
        return SketchBasis(self.mean, self.components[:, :rank], self.step, groups, self.meta, self.margin)

    def with_predictor(self, predictor: SketchPredictor | None) -> "SketchBasis":
        """The same basis with another predictor; see `residual_spread` for the groups that suit it."""
        return self._changed(predictor=predictor, _tables={})

    def with_groups(self, groups: Sequence[CoordinateGroup]) -> "SketchBasis":
        """The same basis with other groups."""
        return self._changed(groups=tuple(groups))

    def with_margin(self, margin: float) -> "SketchBasis":
        """The same basis with another margin."""
        return self._changed(margin=margin)

    def tables(self, rank: int) -> PredictorTables | None:
        """The predictor's tables for the leading `rank` coordinates, made once; None without a predictor."""
        if self.predictor is None:
            return None
        with _MAKING_TABLES:
            if rank not in self._tables:
                made = self.predictor.tables(self.components, step=self.step, rank=rank)
                self._tables[rank] = made
            return self._tables[rank]

    def predict(self, token_ids: Int32, head_ids: Int32) -> Float32:
        """Predicted coordinates, float32 [n, r], from input ids [n] and all stored head ids [n, k]."""
        predicted = np.zeros((len(token_ids), self.rank), np.float32)
        if (tables := self.tables(self.rank)) is not None:
            for rows, sums in tables.sums(token_ids, head_ids):
                np.multiply(sums, np.float32(self.step / SUBSTEPS), out=predicted[rows])
        return predicted

    def residual_spread(
        self, coordinates: Float32, token_ids: Int32, head_ids: Int32
    ) -> npt.NDArray[np.float64]:
        """Root mean squares, float64 [r], of what is left of coordinates [n, r]; for `plan_groups`."""
        left = coordinates - self.predict(token_ids, head_ids)
        return np.asarray(np.sqrt(np.square(left, dtype=np.float64).mean(axis=0)), np.float64)

    def to_bytes(self) -> bytes:
        """The sidecar file; equal bases give equal bytes."""
        groups = np.array([(g.start, g.stop, g.levels) for g in self.groups], np.int32)
        tensors: Arrays = {
            "mean": self.mean,
            "components": self.components.astype(np.float16),
            "step": np.array([self.step], np.float64),
            "groups": groups,
            "margin": np.array([self.margin], np.float32),
        }
        if self.predictor is not None:
            tensors["predictor_head"] = self.predictor.head
            tensors["predictor_token"] = self.predictor.token
            tensors["predictor_constant"] = self.predictor.constant
        meta = json.dumps(self.meta, sort_keys=True)
        if len(meta) > MAX_META_BYTES:
            raise IncompatibleError(
                f"SketchBasis: meta must be at most {MAX_META_BYTES} bytes, found {len(meta)}"
            )
        return dump_tensors(tensors, {**_FORMAT, "meta": meta})

    @staticmethod
    def from_bytes(data: bytes, *, where: str) -> "SketchBasis":
        """The basis in a sidecar file.

        Raises:
            CorruptionError: anything but the five tensors, and perhaps the three of a predictor, with fitting
                shapes, types and values.
        """
        tensors, metadata = parse_tensors(data, where=where)
        kinds = {name: (a.dtype.str[1:], a.ndim) for name, a in tensors.items()}
        single = all(a.shape == (1,) for name, a in tensors.items() if name in ("step", "margin"))
        predicts = "predictor_constant" in kinds
        if (
            kinds != _TENSORS | (_PREDICTOR_TENSORS if predicts else {})
            or not single
            or tensors["groups"].shape[1] != 3
        ):
            raise CorruptionError(f"{where}: must hold tensors {_TENSORS}, found {kinds}")
        if {k: metadata.get(k) for k in _FORMAT} != _FORMAT:
            raise CorruptionError(
                f"{where}: metadata must say {_FORMAT}, found {dict(list(metadata.items())[:4])}"
            )
        meta = Fields(
            parse_object(
                metadata.get("meta", "{}").encode(), where=f"{where} meta", max_bytes=MAX_META_BYTES
            ),
            where=f"{where} meta",
        )
        groups = tuple(CoordinateGroup(*map(int, row)) for row in tensors["groups"][: MAX_GROUPS + 1])
        try:
            predictor = SketchPredictor(*(tensors[name] for name in _PREDICTOR_TENSORS)) if predicts else None
            return SketchBasis(
                tensors["mean"],
                tensors["components"],
                float(tensors["step"][0]),
                groups,
                meta.strings(),
                float(tensors["margin"][0]),
                predictor,
            )
        except IncompatibleError as error:
            raise CorruptionError(f"{where}: {error}") from error


def plan_groups(spread: npt.ArrayLike, step: float) -> tuple[CoordinateGroup, ...]:
    """Groups for coordinates in order, by their standard deviations.

    Each coordinate gets the fewest levels whose range covers 3.1 deviations, never fewer than a later one.
    Measured at r=256, step 60: 35.3 B a token, 1e-3 of the values clipped.
    """
    reach = np.array([level // 2 + 0.5 for level in LEVELS]) * step / MIN_DEVIATIONS
    choice = np.searchsorted(reach, np.atleast_1d(spread)).clip(max=len(LEVELS) - 1)
    choice = np.maximum.accumulate(choice[::-1])[::-1]
    edges = [0, *(np.flatnonzero(np.diff(choice)) + 1).tolist(), len(choice)]
    return tuple(CoordinateGroup(a, b, LEVELS[choice[a]]) for a, b in pairwise(edges))

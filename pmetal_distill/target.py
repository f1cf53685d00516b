"""What the teacher says about the next token, in the one form that every loss takes. Free until it is read.

A `TeacherTarget` is independent of temperature: dense logits, or the parts of a cache (head, tail curve,
sketch). `target.at(T)` gives a `SoftTarget`, the log-probabilities of head and tail at that temperature: O(k)
a token. Rows over the whole vocabulary exist only where `SoftTarget.rows` is called: call it on few tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np

from pmetal_distill.host_inputs import to_device
from pmetal_distill.reductions import NEGATIVE, row_logsumexp
from pmetal_distill.tail_basis import TailBasis
from schemas.arrays import TargetArrays
from schemas.curve import TailCurve
from schemas.errors import IncompatibleError, UsageError
from schemas.spec import TargetSpec

TargetKind = Literal["dense", "none", "bucket", "sketch"]


class RowHead(Protocol):
    """Whatever turns hidden states into logits."""

    def logits(self, hidden: mx.array, /) -> mx.array:
        """Hidden states [n, d] -> logits [n, V]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTarget:
    """The teacher's distribution of the next token for N tokens, at any temperature.

    Build it with `dense`, `live`, `none`, `bucket`, `sketch` or `from_arrays`.

    Attributes:
        kind: "dense" and "sketch" are complete over the vocabulary; "bucket" knows the tail's mass only;
            "none" is a head renormalised, with probability 0 outside.
        vocab_size: V.
        head_ids: int32 [N, k], descending teacher logit.
        head_logprobs: float32 [N, k], natural log at T=1.
        tail_curve: float32 [N, m], read through `curve`.
        curve: interpolation of the tail's log-partition; None where there is no tail.
        coordinates: float32 [N, r].
        bases: the bases that the tokens were coded in, usually one.
        basis_index: int32 [N], which of `bases`; None if there is one.
        source: dense only: logits [N, V], or hidden states [N, d] with `head`.
        head: dense only: makes logits from `source`.
    """

    kind: TargetKind
    vocab_size: int
    head_ids: mx.array | None = None
    head_logprobs: mx.array | None = None
    tail_curve: mx.array | None = None
    curve: TailCurve | None = None
    coordinates: mx.array | None = None
    bases: tuple[TailBasis, ...] = ()
    basis_index: mx.array | None = None
    source: mx.array | None = None
    head: RowHead | None = None

    @staticmethod
    def dense(logits: mx.array) -> "TeacherTarget":
        """A live teacher's logits [..., V], any float type."""
        rows = logits.reshape(-1, logits.shape[-1])
        return TeacherTarget("dense", rows.shape[-1], source=mx.stop_gradient(rows))

    @staticmethod
    def live(hidden: mx.array, head: RowHead, *, vocab_size: int) -> "TeacherTarget":
        """A live teacher's final hidden states [..., d]; logits are made a chunk at a time."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return TeacherTarget("dense", vocab_size, source=mx.stop_gradient(rows), head=head)

    @staticmethod
    def none(head_ids: mx.array, head_logprobs: mx.array, *, vocab_size: int) -> "TeacherTarget":
        """A head [..., k] renormalised over itself."""
        ids, logprobs = _flat(head_ids), _flat(head_logprobs)
        return TeacherTarget("none", vocab_size, ids.astype(mx.int32), logprobs.astype(mx.float32))

    @staticmethod
    def bucket(
        head_ids: mx.array, head_logprobs: mx.array, tail_curve: mx.array, *, curve: TailCurve
    ) -> "TeacherTarget":
        """A head [..., k] and the tail's mass through its curve [..., m]."""
        target = TeacherTarget.none(head_ids, head_logprobs, vocab_size=curve.vocab_size)
        return replace(target, kind="bucket", curve=curve, tail_curve=_flat(tail_curve).astype(mx.float32))

    @staticmethod
    def sketch(
        head_ids: mx.array,
        head_logprobs: mx.array,
        tail_curve: mx.array,
        coordinates: mx.array,
        *,
        curve: TailCurve,
        bases: Sequence[TailBasis],
        basis_index: mx.array | None = None,
    ) -> "TeacherTarget":
        """A head [..., k], the tail's mass and its shape through coordinates [..., r]."""
        target = TeacherTarget.bucket(head_ids, head_logprobs, tail_curve, curve=curve)
        index = None if basis_index is None or len(bases) == 1 else basis_index.reshape(-1).astype(mx.int32)
        y = _flat(coordinates).astype(mx.float32)
        return replace(target, kind="sketch", coordinates=y, bases=tuple(bases), basis_index=index)

    @staticmethod
    def from_arrays(
        arrays: TargetArrays,
        spec: TargetSpec,
        *,
        bases: Sequence[TailBasis] = (),
        basis_index: np.ndarray[Any, Any] | None = None,
        vocab_size: int | None = None,
    ) -> "TeacherTarget":
        """What a cache holds, for tokens of any leading shape.

        Args:
            arrays: NumPy parts of the target; copied to the device.
            spec: of the cache (`spec.with_k` after truncating the head).
            bases: for tail "sketch", on the device.
            basis_index: int [...], which of `bases` each token uses; needed for more than one.
            vocab_size: of a student with fewer tokens than the teacher, as padded vocabularies have; the
                bases must be `TailBasis.restricted` to it.

        Raises:
            IncompatibleError: the parts do not fit `spec` or `bases`.
        """
        vocab_size = min(vocab_size or spec.vocab_size, spec.vocab_size)
        _check_arrays(arrays, spec, bases, basis_index, vocab_size)
        ids, logprobs, values, coordinates = (to_device(a) for a in arrays.parts())
        if spec.tail == "none":
            return TeacherTarget.none(ids, logprobs, vocab_size=vocab_size)
        if spec.tail == "bucket":
            target = TeacherTarget.bucket(ids, logprobs, values, curve=spec.curve)
            return replace(target, vocab_size=vocab_size)
        index = None if basis_index is None else to_device(np.asarray(basis_index, np.int32))
        target = TeacherTarget.sketch(
            ids, logprobs, values, coordinates, curve=spec.curve, bases=bases, basis_index=index
        )
        return replace(target, vocab_size=vocab_size)

    @property
    def num_tokens(self) -> int:
        """N."""
        rows = self.head_ids if self.source is None else self.source
        return 0 if rows is None else int(rows.shape[0])

    def at(self, temperature: float) -> "SoftTarget":
        """The target at a softmax temperature.

        Raises:
            UsageError: `temperature` is not positive and finite, or outside the stored tail curve.
        """
        b = 1.0 / check_temperature(temperature)
        soft = SoftTarget(
            self.kind,
            self.vocab_size,
            mx.array(b, mx.float32),
            bases=self.bases,
            basis_index=self.basis_index,
            coordinates=self.coordinates,
            source=self.source,
            head=self.head,
        )
        if self.head_ids is None or self.head_logprobs is None:
            return soft
        head = self.head_logprobs * b
        total = row_logsumexp(head)
        tail = mx.full(total.shape, NEGATIVE)
        if self.curve is not None and self.tail_curve is not None:
            score = head[:, -1] + self._tail_partition(self.curve, self.tail_curve, b)
            total = mx.logaddexp(total, score)
            tail = score - total
        return replace(
            soft,
            head_ids=self.head_ids,
            head_logprobs=head - total[:, None],
            tail_logprobs=tail,
            tail_ceiling=self._tail_ceiling(),
        )

    def _tail_ceiling(self) -> mx.array | None:
        if self.curve is None or self.tail_curve is None or self.coordinates is None:
            return None
        if all(basis.column_means is None for basis in self.bases):
            return None
        weights = mx.array(self.curve.slope_weights()[1:].astype(np.float32))
        slopes = (self.tail_curve - self.curve.at_zero) @ weights
        ceilings = [basis.ceilings(self.coordinates, slopes) for basis in self.bases]
        return _of_own_basis(ceilings, self.basis_index)

    def _tail_partition(self, curve: TailCurve, values: mx.array, b: float) -> mx.array:
        try:
            weights = curve.weights(b)
        except ValueError as error:
            raise UsageError(
                f"temperature must be at least {1 / curve.nodes[-1]:g}, where the cached tail curve ends; "
                f"found {1 / b:g}; raise the temperature, or cache again with a curve node of {b:g} or more"
            ) from error
        return values @ mx.array(weights[1:].astype(np.float32)) + float(weights[0] * curve.at_zero)


@dataclass(frozen=True, slots=True, eq=False)
class SoftTarget:
    """A `TeacherTarget` at one temperature. All fields are per token, so a chunk is `tokens(slice)`.

    Attributes:
        kind, vocab_size, head_ids, coordinates, bases, basis_index, source, head: as in `TeacherTarget`.
        inv_temperature: b = 1/T, float32 scalar.
        head_logprobs: float32 [N, k] at T.
        tail_logprobs: float32 [N], log of the tail's mass at T; `NEGATIVE` where it is 0.
        tail_ceiling: float32 [N], largest tail logit of a sketch; None where it has no ceiling.
    """

    kind: TargetKind
    vocab_size: int
    inv_temperature: mx.array
    head_ids: mx.array | None = None
    head_logprobs: mx.array | None = None
    tail_logprobs: mx.array | None = None
    tail_ceiling: mx.array | None = None
    coordinates: mx.array | None = None
    bases: tuple[TailBasis, ...] = ()
    basis_index: mx.array | None = None
    source: mx.array | None = None
    head: RowHead | None = None

    @property
    def complete(self) -> bool:
        """Whether every token of the vocabulary has its own probability."""
        return self.kind in ("dense", "sketch")

    @property
    def num_tokens(self) -> int:
        """N."""
        rows = self.head_ids if self.source is None else self.source
        return 0 if rows is None else int(rows.shape[0])

    def tokens(self, index: slice | mx.array) -> "SoftTarget":
        """The same target for some of its tokens."""
        arrays = self.arrays()
        del arrays["inv_temperature"]
        return self.with_arrays({name: array[index] for name, array in arrays.items()})

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that change from batch to batch, to pass through `mx.compile`; see `with_arrays`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, mx.array)}

    def with_arrays(self, arrays: dict[str, mx.array]) -> "SoftTarget":
        """The same kind of target, same bases and teacher head, with other arrays."""
        changes: dict[str, Any] = dict(arrays)
        return replace(self, **changes)

    def events(self) -> mx.array:
        """Log-probabilities of the k head tokens and of the tail as one event, [N, k+1]; not for "dense"."""
        assert self.head_logprobs is not None
        assert self.tail_logprobs is not None
        return mx.concatenate([self.head_logprobs, self.tail_logprobs[:, None]], axis=-1)

    def tail_logits(self) -> mx.array:
        """Tail logits at T=1 [N, V] of a sketch, up to a constant; head entries are meaningless."""
        rows = self.uncut_tail_logits()
        return rows if self.tail_ceiling is None else mx.minimum(rows, self.tail_ceiling[:, None])

    def uncut_tail_logits(self) -> mx.array:
        """The same before `tail_ceiling` cuts them."""
        assert self.coordinates is not None
        return _of_own_basis([basis.logits(self.coordinates) for basis in self.bases], self.basis_index)

    def logits(self) -> mx.array:
        """Teacher logits at T=1 [N, V] of a dense target, float32."""
        assert self.source is not None
        rows = self.source if self.head is None else self.head.logits(self.source)
        return rows.astype(mx.float32)

    def rows(self) -> mx.array:
        """Log-probabilities of every token at this temperature, float32 [N, V]; only if `complete`."""
        if self.kind == "dense":
            logits = self.logits()
            shifted = mx.maximum(logits - logits.max(axis=-1, keepdims=True), NEGATIVE)
            shifted = shifted * self.inv_temperature
            return shifted - row_logsumexp(shifted)[:, None]
        assert self.head_ids is not None
        assert self.head_logprobs is not None
        assert self.tail_logprobs is not None
        scores = self.tail_logits() * self.inv_temperature
        outside = mx.put_along_axis(scores, self.head_ids, mx.array(NEGATIVE), axis=-1)
        offset = self.tail_logprobs - row_logsumexp(outside)
        return mx.put_along_axis(scores + offset[:, None], self.head_ids, self.head_logprobs, axis=-1)


def check_temperature(temperature: float, *, where: str = "temperature") -> float:
    """`temperature` as a float.

    Raises:
        UsageError: it is not a positive, finite number.
    """
    value = float(temperature)
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{where} must be a positive number, found {temperature}; 2.0 is the usual choice")
    return value


def _flat(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def _of_own_basis(candidates: Sequence[mx.array], basis_index: mx.array | None) -> mx.array:
    """Each token's entry, [n] or [n, V], of the arrays made with every basis."""
    found = candidates[0]
    for number, candidate in enumerate(candidates[1:], start=1):
        assert basis_index is not None
        chosen = (basis_index == number).reshape(-1, *[1] * (found.ndim - 1))
        found = mx.where(chosen, candidate, found)
    return found


def _check_arrays(
    arrays: TargetArrays,
    spec: TargetSpec,
    bases: Sequence[TailBasis],
    basis_index: np.ndarray[Any, Any] | None,
    vocab_size: int,
) -> None:
    found = (arrays.k, arrays.num_nodes)
    if found != (spec.k, spec.num_nodes):
        raise IncompatibleError(
            f"target: k and curve nodes must be ({spec.k}, {spec.num_nodes}) as in the spec, found {found}"
        )
    if arrays.head_ids.size and vocab_size <= arrays.head_ids.max() < spec.vocab_size:
        raise IncompatibleError(
            f"target: head ids must be below {vocab_size}, the student's vocabulary, found "
            f"{arrays.head_ids.max()} among the teacher's first choices; take a student with an embedding of "
            f"{spec.vocab_size} rows"
        )
    if arrays.head_ids.size and not 0 <= arrays.head_ids.min() <= arrays.head_ids.max() < vocab_size:
        raise IncompatibleError(
            f"target: head ids must be from 0 to {vocab_size - 1}, found {arrays.head_ids.min()} "
            f"to {arrays.head_ids.max()}; run 'pmetal-pipeline verify' on the cache"
        )
    if spec.tail != "sketch":
        return
    shapes = [tuple(basis.components.shape) for basis in bases]
    wanted = (vocab_size, arrays.rank)
    if not shapes or any(shape != wanted for shape in shapes) or (len(bases) > 1 and basis_index is None):
        raise IncompatibleError(
            f"target: a sketch must come with bases of shape {wanted} (and an index, if several), "
            f"found {shapes}"
        )

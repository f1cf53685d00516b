"""The whole distribution back from a cached target, in NumPy. V x r products a token, then an exp per T.

This is the definition in code (`schemas/FORMAT.md`), plain enough to check the device code against; `replay`,
`plan` and the error watch use it on a few thousand tokens.
"""

import numpy as np
import numpy.typing as npt

from schemas.arrays import Float32, TargetArrays
from schemas.basis import SketchBasis
from schemas.errors import IncompatibleError
from schemas.spec import TargetSpec
from schemas.tail import tail_logits

Float64 = npt.NDArray[np.float64]


def reconstruct_logprobs(
    targets: TargetArrays,
    spec: TargetSpec,
    *,
    temperature: float,
    basis: SketchBasis | None = None,
    tail: Float32 | None = None,
) -> Float32:
    """log p_T of every token, float32 [n, V].

    A "bucket" spreads the tail's mass evenly; "none" gives -inf outside the head. Memory: two [n, V] arrays;
    call it on a few hundred rows at a time.

    Args:
        targets: leading shape [n].
        spec: of these targets.
        temperature: at least 1 / (last curve node).
        basis: for tail "sketch".
        tail: `schemas.tail.tail_logits` of the same rows, if already there for another temperature.

    Raises:
        IncompatibleError: a sketch without a basis, or of another rank.
        ValueError: a temperature that the curve does not reach.
    """
    head, mass = head_logprobs(targets, spec, temperature=temperature)
    n = len(head)
    if spec.tail == "none":
        rows = np.full((n, spec.vocab_size), -np.inf, np.float32)
    elif spec.tail == "bucket":
        rows = np.repeat((mass - spec.curve.at_zero)[:, None].astype(np.float32), spec.vocab_size, axis=1)
    else:
        if basis is None:
            raise IncompatibleError("rebuild: a sketch must come with its basis, found none")
        tail = tail_logits(basis, spec.curve, targets) if tail is None else tail
        rows = tail * np.float32(1 / temperature)
        np.put_along_axis(rows, targets.head_ids, -np.inf, axis=1)
        rows -= rows.max(axis=1, keepdims=True)
        rows += (mass - np.log(np.exp(rows).sum(axis=1, dtype=np.float64))).astype(np.float32)[:, None]
    np.put_along_axis(rows, targets.head_ids, head.astype(np.float32), axis=1)
    return rows


def head_logprobs(targets: TargetArrays, spec: TargetSpec, *, temperature: float) -> tuple[Float64, Float64]:
    """log p_T of the head, float64 [n, k], and log mass of the tail, float64 [n] (-inf without a tail)."""
    b = 1.0 / temperature
    head = b * targets.head_logprobs.astype(np.float64)
    total = np.logaddexp.reduce(head, axis=1)
    if spec.tail == "none":
        return head - total[:, None], np.full(len(head), -np.inf)
    tail = head[:, -1] + spec.curve.evaluate(targets.tail_curve, b)
    total = np.logaddexp(total, tail)
    return head - total[:, None], tail - total

"""Tail logits from a sketch, the definition in code. Costs V x r products a token and one array [n, V].

The sketch gives logits up to a constant, and with noise. No tail logit exceeds the smallest head logit, whose
place on the sketch's scale follows from the mean of all logits, so what rises above that is cut off.
"""

import numpy as np

from schemas.arrays import Float32, TargetArrays
from schemas.basis import SketchBasis
from schemas.curve import Float64, TailCurve
from schemas.errors import IncompatibleError


def tail_ceilings(basis: SketchBasis, curve: TailCurve, targets: TargetArrays) -> Float64:
    """The largest tail logit of each token, on the scale of `mean + components @ y`.

    Args:
        basis: as the coordinates were coded, or truncated like them; its margin must not be off.
        curve: of `targets` (with their k).
        targets: leading shape [...], decoded.

    Returns:
        float64 [...]: mean of `mean + components @ y` over the vocabulary - A'(0) - margin.
    """
    level, columns = basis.centre
    height = level + targets.coordinates.astype(np.float64) @ columns
    return np.asarray(height - curve.slope(targets.tail_curve) - basis.margin, np.float64)


def tail_logits(basis: SketchBasis, curve: TailCurve, targets: TargetArrays) -> Float32:
    """Logits of the tail at T=1 up to a constant; entries of the head are meaningless.

    Args:
        basis: as the coordinates were coded, or truncated like them.
        curve: of `targets` (with their k).
        targets: leading shape [...], decoded.

    Returns:
        float32 [..., V].

    Raises:
        IncompatibleError: `targets` of another rank.
    """
    if targets.rank != basis.rank:
        raise IncompatibleError(
            f"tail_logits: coordinates must have the rank {basis.rank} of the basis, found {targets.rank}"
        )
    # One product whatever the leading shape: products of other shapes round differently.
    coordinates = targets.coordinates
    rows = coordinates.reshape(-1, basis.rank) @ basis.components.T
    rows = rows.reshape(*coordinates.shape[:-1], rows.shape[-1])
    rows += basis.mean
    if basis.has_ceiling:
        ceilings = tail_ceilings(basis, curve, targets).astype(np.float32)
        np.minimum(rows, ceilings[..., None], out=rows)
    return rows

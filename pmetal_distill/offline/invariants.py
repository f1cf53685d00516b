"""What must hold for the values of a decoded row group, whatever teacher it came from. Cost: a few passes."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrays import Bool, Float32, TargetArrays, TokenRows
from schemas.grid import MAX_CURVE
from schemas.planes import from_column
from schemas.spec import TargetSpec

SUM_TOLERANCE = 0.02
_TOKEN_PLANES = ("tok0", "tok1", "tok2")


def broken_rows(rows: TokenRows, targets: TargetArrays, spec: TargetSpec) -> Iterator[tuple[int, str]]:
    """The first row that breaks each invariant, with what must hold.

    Checked on trained rows: distinct head ids; log-probabilities that are finite, not positive and do not
    rise; head probabilities that sum to at most 1; a curve that starts at log(V - k), falls and is convex.
    """
    on = rows.loss_mask
    checks = {
        "documents must be numbered from 0": rows.documents < 0,
        "head ids must be distinct": on & _repeats(targets.head_ids),
        "log-probabilities must be finite": on & ~np.isfinite(targets.head_logprobs).all(axis=1),
        "log-probabilities must not be positive": on & (targets.head_logprobs > 1e-4).any(axis=1),
        "log-probabilities must not rise": on & (np.diff(targets.head_logprobs, axis=1) > 1e-4).any(axis=1),
        "head probabilities must sum to at most 1": on & _too_likely(targets.head_logprobs),
    }
    if spec.num_nodes:
        rises, concave = _bad_curve(targets.tail_curve, spec)
        checks["the tail curve must fall from log(V - k)"] = on & rises
        checks["the tail curve must be convex"] = on & concave
    if targets.rank:
        checks["coordinates must be finite"] = on & ~np.isfinite(targets.coordinates).all(axis=1)
    for must, broken in checks.items():
        if broken.any():
            yield int(broken.argmax()), must


def unclean_masked_row(table: pa.Table, loss_mask: Bool) -> int | None:
    """The first row outside the loss mask that has a target byte other than zero."""
    masked = ~loss_mask
    if not masked.any():
        return None
    unclean = np.zeros(len(loss_mask), np.bool_)
    for name in table.schema.names:
        if pa.types.is_fixed_size_binary(table.schema.field(name).type) and name not in _TOKEN_PLANES:
            unclean |= from_column(table.column(name)).any(axis=1)
    unclean &= masked
    return int(unclean.argmax()) if unclean.any() else None


def _repeats(ids: npt.NDArray[np.int32]) -> Bool:
    ordered = np.sort(ids, axis=1)
    return np.asarray((np.diff(ordered, axis=1) == 0).any(axis=1))


def _too_likely(logprobs: Float32) -> Bool:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(logprobs.astype(np.float64)).sum(axis=1) > 1 + SUM_TOLERANCE)


def _bad_curve(curve: Float32, spec: TargetSpec) -> tuple[Bool, Bool]:
    """Rows whose curve rises, or is not convex, by more than rounding explains.

    Rounding moves each value by half a curve step, and the decoded z_ref by half a log-probability step,
    which tilts the curve by b times that.
    """
    nodes = np.array((0.0, *spec.curve_nodes))
    start = np.full((len(curve), 1), spec.curve.at_zero)
    values = np.concatenate([start, curve.astype(np.float64)], axis=1)
    widths = np.diff(nodes)
    slopes = np.diff(values, axis=1) / widths
    slack = 1.01 * spec.curve_step / widths
    rises = (slopes > spec.logprob_step / 2 + slack + 1e-3).any(axis=1)
    clipped = (curve <= -MAX_CURVE * spec.curve_step).any(axis=1)
    concave = (np.diff(slopes, axis=1) < -(slack[1:] + slack[:-1] + 1e-3)).any(axis=1)
    return np.asarray(rises), np.asarray(concave & ~clipped)

"""Sums over a student's row beside a teacher's row, a dense teacher or a sketch rebuilt for a few tokens.

`pair_sums` reads both rows once and serves forward KL, reverse KL and soft cross-entropy. `pair_divergence`
needs the normalisers before it can add up a mixture or a total variation: a second read of both. Either has
one gradient: two reads and one write; a row whose weights are 0 is only written.
"""

from typing import NamedTuple

import mlx.core as mx

from pmetal_distill.kernels import dispatch
from pmetal_distill.kernels.row import TailSums, head_outputs, padded, parameters, template

FORMS = ("plain", "gap", "mixture", "variation")
Weights = tuple[float, float, float]


class TeacherSums(NamedTuple):
    """What `pair_sums` says about the teacher's row t and both rows together, float32 [n].

    All run over the columns outside the head. Scores are less the largest of their row there: x = z - max z,
    y = t - max t.

    Attributes:
        top: max t.
        soft: ln of the sum of exp(y / T).
        mean: mean of y under softmax(y / T).
        forward_gap: mean of y - x under softmax(y / T).
        reverse_gap: mean of x - y under softmax(x / T); 0 unless asked for.
    """

    top: mx.array
    soft: mx.array
    mean: mx.array
    forward_gap: mx.array
    reverse_gap: mx.array


class PairNorms(NamedTuple):
    """What turns both rows into log-probabilities: ln q = (z - top) / T + offset, ln p likewise. Each [n]."""

    student_top: mx.array
    student_offset: mx.array
    teacher_top: mx.array
    teacher_offset: mx.array


def pair_sums(
    logits: mx.array,
    teacher: mx.array,
    ids: mx.array,
    labels: mx.array,
    inverse: mx.array,
    *,
    reverse: bool,
    ceiling: mx.array | None = None,
) -> tuple[TailSums, TeacherSums]:
    """One pass over a student's and a teacher's logits.

    Args:
        logits: [n, V], float32, float16 or bfloat16.
        teacher: [n, V] of any of these types; entries at the head's ids are ignored.
        ids: int32 [n, k], distinct within a row; k = 0 for a dense teacher.
        labels: int32 [n], negative where there is none.
        inverse: 1/T, scalar.
        reverse: also compute `reverse_gap`.
        ceiling: float32 [n]; teacher logits above it count as equal to it.
    """
    n, k = ids.shape
    capped = ceiling is not None
    constants, threads = template("pair_sums", logits, k, S=teacher.dtype, REVERSE=reverse, CAPPED=capped)
    inputs = {"z": logits, "t": teacher, "ids": ids, "labels": labels, "par": parameters(inverse)}
    inputs["ceiling"] = _or_nothing(ceiling)
    outputs: dispatch.Outputs = {"stats": ((n, 8), mx.float32), **head_outputs(n, k)}
    stats, head, label = dispatch.launch(
        "pair_sums", inputs, outputs, template=constants, groups=n, threads=threads
    )
    s = [stats[:, i] for i in range(8)]
    return TailSums(s[0], s[1], s[2], head[:, :k], label), TeacherSums(*s[3:])


def pair_divergence(
    logits: mx.array,
    teacher: mx.array,
    ids: mx.array,
    inverse: mx.array,
    norms: PairNorms,
    *,
    weights: Weights | None,
    ceiling: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The part of a divergence outside the head, [n], and the sum of its derivatives by ln q, [n].

    Args:
        logits, teacher, ids, inverse, ceiling: as for `pair_sums`.
        norms: of both rows, over all of V.
        weights: (a, b, s) for the sum of a p ln(p / m) + b q ln(q / m) with m = s p + (1 - s) q, 0 < s < 1;
            None for the sum of |p - q| / 2.
    """
    n, k = ids.shape
    form = {"S": teacher.dtype, "MIXTURE": weights is not None, "CAPPED": ceiling is not None}
    constants, threads = template("pair_divergence", logits, k, **form)
    par = parameters(inverse, *(weights or ()))
    inputs = {"z": logits, "t": teacher, "ids": ids, "par": par, "norms": padded(list(norms), 4)}
    inputs["ceiling"] = _or_nothing(ceiling)
    outputs: dispatch.Outputs = {"result": ((n, 2), mx.float32)}
    (result,) = dispatch.launch(
        "pair_divergence", inputs, outputs, template=constants, groups=n, threads=threads
    )
    return result[:, 0], result[:, 1]


class PairWeights(NamedTuple):
    """Weights of a gradient row, each [n] or None for 0; see `pair_slope`."""

    hard: mx.array
    soft: mx.array
    gap: mx.array | None = None
    teacher: mx.array | None = None
    term: mx.array | None = None


def pair_slope(
    logits: mx.array,
    teacher: mx.array,
    ids: mx.array,
    labels: mx.array,
    inverse: mx.array,
    norms: PairNorms,
    weights: PairWeights,
    *,
    divergence: Weights | None,
    head: mx.array,
    label: mx.array,
    ceiling: mx.array | None = None,
) -> mx.array:
    """Gradient rows in the logits' type. With x and y the scores less the tops in `norms`, each entry is

        hard exp(x) + (soft + gap (x - y)) exp(x / T) + teacher exp(y / T) + term d(divergence) / d(ln q).

    Args:
        logits, teacher, ids, labels, inverse, ceiling: as for `pair_sums`.
        norms: as for `pair_divergence`; offsets matter with `term` only.
        weights: the factors.
        divergence: of `term`, as `weights` of `pair_divergence`.
        head: [n, k], what stands at the head's ids instead.
        label: [n], added at the label.
    """
    n, k = ids.shape
    form = "plain" if weights.gap is None else "gap"
    if weights.term is not None:
        form = "variation" if divergence is None else "mixture"
    values = {"S": teacher.dtype, "FORM": FORMS.index(form), "CAPPED": ceiling is not None}
    constants, threads = template("pair_grad", logits, k, **values)
    zero = mx.zeros_like(weights.soft)
    columns = [zero if w is None else w for w in weights]
    inputs = {"z": logits, "t": teacher, "ids": ids, "labels": labels}
    inputs |= {"par": parameters(inverse, *(divergence or ())), "coefficients": padded(columns, 8)}
    inputs |= {"norms": padded(list(norms), 4), "d_head": head, "d_label": label}
    inputs["ceiling"] = _or_nothing(ceiling)
    outputs: dispatch.Outputs = {"dz": (logits.shape, logits.dtype)}
    return dispatch.launch("pair_grad", inputs, outputs, template=constants, groups=n, threads=threads)[0]


def _or_nothing(ceiling: mx.array | None) -> mx.array:
    """An input where there is none."""
    return dispatch.constants(0.0) if ceiling is None else ceiling.astype(mx.float32)

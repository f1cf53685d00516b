"""The divergences between teacher and student, each as two elementwise formulas. No arrays live here.

With p the teacher and q the student over any events (the vocabulary, or head plus tail), a divergence is
`D = sum_j term_j`, and what training needs of it is `slope_j = dD / d log q_j`, because then

    dD / ds_j = (slope_j - q_j sum_i slope_i) / T        (s: student logits, q = softmax(s / T))

whatever the events are. The formulas take an array module `xp`, so MLX and NumPy run the same text.
They stay finite for every finite input: the log of zero is a large negative number, never -inf. Each KL has a
term like `q_j - p_j`, which sums to zero and makes it blind, to first order, to rounding in the normalisers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

from schemas.errors import UsageError

TINY = 1e-37
"""Smallest mixture probability; keeps its log finite. A term below it is 0 to every digit."""


class Events(NamedTuple):
    """Log-probabilities and probabilities of the same events, teacher and student."""

    lp: Any
    p: Any
    lq: Any
    q: Any


class Terms(NamedTuple):
    """Per event: what sums to the divergence, and the derivative with respect to log q."""

    value: Any
    slope: Any


Formula = Callable[[ModuleType, Events, float], Terms]


def _forward_kl(xp: ModuleType, e: Events, _: float) -> Terms:
    return Terms(e.p * (e.lp - e.lq) + (e.q - e.p), -e.p)


def _reverse_kl(xp: ModuleType, e: Events, _: float) -> Terms:
    value = e.q * (e.lq - e.lp)
    return Terms(value + (e.p - e.q), value + e.q)


def _soft_cross_entropy(xp: ModuleType, e: Events, _: float) -> Terms:
    return Terms(-e.p * e.lq, -e.p)


def _total_variation(xp: ModuleType, e: Events, _: float) -> Terms:
    gap = e.q - e.p
    return Terms(0.5 * xp.abs(gap), 0.5 * e.q * xp.sign(gap))


def _jensen_shannon(xp: ModuleType, e: Events, beta: float) -> Terms:
    lm = xp.log(xp.maximum(beta * e.p + (1 - beta) * e.q, TINY))
    slope = (1 - beta) * e.q * (e.lq - lm)
    return Terms(beta * e.p * (e.lp - lm) + slope, slope)


def _skewed_forward_kl(xp: ModuleType, e: Events, skew: float) -> Terms:
    m = xp.maximum(skew * e.p + (1 - skew) * e.q, TINY)
    return Terms(e.p * (e.lp - xp.log(m)) + (m - e.p), (skew - 1) * e.p * (e.q / m))


def _skewed_reverse_kl(xp: ModuleType, e: Events, skew: float) -> Terms:
    m = xp.maximum(skew * e.q + (1 - skew) * e.p, TINY)
    value = e.q * (e.lq - xp.log(m))
    return Terms(value + (m - e.q), value + e.q * (1 - skew * (e.q / m)))


class KernelForm(NamedTuple):
    """How the fused kernels add up a divergence outside the teacher's head (`kernels.pair`).

    Attributes:
        name: "means" for what means over the two rows give, "mixture" or "variation".
        weights: of a mixture, (a, b, s) for a p ln(p / m) + b q ln(q / m) with m = s p + (1 - s) q.
        balance: factor of the q - p that the formula adds to each event of a mixture.
    """

    name: Literal["means", "mixture", "variation"]
    weights: tuple[float, float, float] | None = None
    balance: float = 0.0


class _Entry(NamedTuple):
    formula: Formula
    parameter: str | None = None
    default: float = 0.0
    refused: frozenset[str] = frozenset()
    slope_is_minus_p: bool = False
    # By the parameter; None where no kernel knows the formula, which then runs in plain operations.
    kernel: Callable[[float], KernelForm] | None = None


def _means(_: float) -> KernelForm:
    return KernelForm("means")


_REGISTRY: dict[str, _Entry] = {
    "forward_kl": _Entry(_forward_kl, slope_is_minus_p=True, kernel=_means),
    "reverse_kl": _Entry(_reverse_kl, refused=frozenset({"none"}), kernel=_means),
    "jensen_shannon": _Entry(
        _jensen_shannon, "beta", 0.5, kernel=lambda beta: KernelForm("mixture", (beta, 1 - beta, beta))
    ),
    "soft_cross_entropy": _Entry(_soft_cross_entropy, slope_is_minus_p=True, kernel=_means),
    "total_variation": _Entry(_total_variation, kernel=lambda _: KernelForm("variation")),
    "skewed_forward_kl": _Entry(
        _skewed_forward_kl,
        "skew",
        0.1,
        kernel=lambda skew: KernelForm("mixture", (1, 0, skew), balance=1 - skew),
    ),
    "skewed_reverse_kl": _Entry(
        _skewed_reverse_kl,
        "skew",
        0.1,
        kernel=lambda skew: KernelForm("mixture", (0, 1, 1 - skew), balance=skew - 1),
    ),
}

LOSS_NAMES = tuple(_REGISTRY)


@dataclass(frozen=True, slots=True)
class Divergence:
    """One of the soft losses, with its parameter.

    - `forward_kl`: KL(p || q) = sum p log(p / q), entropy term included (Hinton et al. 2015,
      arXiv:1503.02531).
    - `reverse_kl`: KL(q || p) (Gu et al. 2024, MiniLLM, arXiv:2306.08543).
    - `jensen_shannon`: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
      (Agarwal et al. 2024, GKD, arXiv:2306.13649).
    - `soft_cross_entropy`: -sum p log q.
    - `total_variation`: half the sum of |p - q|.
    - `skewed_forward_kl`: KL(p || skew p + (1 - skew) q); `skewed_reverse_kl`: KL(q || skew q + (1 - skew) p)
      (Ko et al. 2024, DistiLLM, arXiv:2402.03898).

    Attributes:
        name: one of `LOSS_NAMES`.
        parameter: beta or skew, strictly between 0 and 1; the usual value if None; unused by the others.

    Raises:
        UsageError: an unknown name, or a parameter out of range.
    """

    name: str = "forward_kl"
    parameter: float | None = None

    def __post_init__(self) -> None:
        entry = _REGISTRY.get(self.name)
        if entry is None:
            raise UsageError(f"loss must be one of {', '.join(LOSS_NAMES)}; found '{self.name}'")
        value = entry.default if self.parameter is None else float(self.parameter)
        if entry.parameter is not None and not 0 < value < 1:
            raise UsageError(
                f"{self.name}: {entry.parameter} must lie strictly between 0 and 1, found {self.parameter}; "
                "at the ends use forward_kl or reverse_kl"
            )
        object.__setattr__(self, "parameter", value)

    @property
    def slope_is_minus_p(self) -> bool:
        """Whether the gradient is (q - p) / T, so that no pass over the row is needed to know it."""
        return _REGISTRY[self.name].slope_is_minus_p

    @property
    def kernel_form(self) -> KernelForm | None:
        """What the fused kernels need to know of it; None where they do not know it."""
        assert self.parameter is not None
        form = _REGISTRY[self.name].kernel
        return None if form is None else form(self.parameter)

    def check(self, kind: str) -> None:
        """Refuses a target kind with which the divergence has no meaning.

        Raises:
            UsageError: reverse KL on a head without tail.
        """
        if kind in _REGISTRY[self.name].refused:
            raise UsageError(
                f"{self.name} needs the teacher's whole distribution: with tail '{kind}' the teacher gives "
                "probability 0 outside its head, so the divergence is infinite (ignoring that would reward a "
                "student for leaving the head); use a cache with tail 'sketch' or 'bucket', or forward_kl"
            )

    def terms(self, xp: ModuleType, events: Events) -> Terms:
        """Values and slopes of `events`, elementwise, with the array module `xp`."""
        assert self.parameter is not None
        return _REGISTRY[self.name].formula(xp, events, self.parameter)

"""Ticks of axes, numbers as people write them, and how wide text will be. Costs nothing."""

import math
from collections.abc import Sequence

_STEPS, _WHOLE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0), (1.0, 2.0, 5.0, 10.0)
_NARROW, _WIDE = frozenset("ijlt.,:;'|!()[]/ fr"), frozenset("mwMWGOQ@%")


def linear_ticks(low: float, high: float, *, most: int, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers that cover `low` to `high`; the first and last may lie outside.

    Args:
        low, high: finite, low < high.
        most: wanted number of intervals, at most.
        whole: only whole numbers.
    """
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(max(raw, 1.0) if whole else raw))
    step = next(s * power for s in (_WHOLE_STEPS if whole else _STEPS) if s * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers on a logarithmic axis that cover `low` to `high`; the first and last may lie outside."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        every = [d * 10.0**n for n in range(first, last + 1) for d in digits]
        inside = _covering(every, low, high)
        if len(inside) <= most + 1:
            return inside
    stride = -(-(last - first) // most)
    return [10.0**n for n in range(first, last + stride, stride)]


def _covering(values: Sequence[float], low: float, high: float) -> list[float]:
    """The values from the last one below `low` to the first one above `high`."""
    below = [v for v in values if v <= low * (1 + 1e-9)]
    above = [v for v in values if v >= high * (1 - 1e-9)]
    start = below[-1] if below else values[0]
    stop = above[0] if above else values[-1]
    return [v for v in values if start <= v <= stop]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels with the same number of decimals, or all with an exponent."""
    sizes = [abs(t) for t in ticks if t]
    if sizes and (min(sizes) < 1e-3 or max(sizes) >= 1e6):
        return [short(t) for t in ticks]
    if sizes and max(sizes) / min(sizes) > 50:
        return [short(t) for t in ticks]
    decimals = max((len(f"{t:.6f}".rstrip("0").split(".")[1]) for t in ticks), default=0)
    return [f"{t:,.{decimals}f}" for t in ticks]


def short(value: float) -> str:
    """A number in three or four significant digits: 0.0091, 2.538, 1,234, 6e-4."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else _exponent(value)
    return f"{value:.4g}" if size >= 1e-3 else _exponent(value)


def _exponent(value: float) -> str:
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.3g} %"


def file_size(num_bytes: float) -> str:
    """Bytes in the largest decimal unit that keeps a digit before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def text_width(text: str, size: float) -> float:
    """About how wide text is in a sans-serif font, in units of `size`; fonts differ, so a little too wide."""
    total = sum(0.34 if c in _NARROW else 0.9 if c in _WIDE else 0.68 if c.isupper() else 0.58 for c in text)
    return total * size

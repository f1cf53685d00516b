"""What a soft-cap on the head costs the sketch, on a synthetic head: KL(teacher || rebuilt) a token.

    python benchmarks/softcap.py [--cap 30] [--rank 64] [--step 0.5]

Logits are W h, or cap * tanh(W h / cap), with a spectrum of h that falls as 1 / i; the largest product of a
row is 23 in the median and 80 at most. Each target has the exact top 16 and tail mass; its tail is rebuilt
from coordinates rounded to one step: of the logits that are stored (with a cap, by the range finder on
logits), or of the products before the cap, which is then applied to what is rebuilt. The second needs the
row's own constant besides, which a cap does not let go; here it is exact. Ten seconds on two cores.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (preloads OpenBLAS)

# isort: split
import numpy as np

from benchmarks.gradients import softmax
from pmetal_distill.offline.sketch import (
    FittedSketch,
    Moments,
    fit_basis_linear,
    fit_basis_logits,
    meant_tokens,
)

V, D, K, ROWS, HELD_BACK = 8192, 128, 16, 4096, 512
TEMPERATURES = (1.0, 2.0, 4.0)


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [V, D] and states [ROWS + HELD_BACK, D] whose products have a standard deviation of about 7."""
    rng = np.random.default_rng(seed)
    spread = 1 / np.arange(1, D + 1)
    hidden = rng.standard_normal((ROWS + HELD_BACK, D)) * spread
    weight = rng.standard_normal((V, D))
    return weight.astype(np.float32), (7 / np.sqrt((spread**2).sum()) * hidden).astype(np.float32)


def capped(products: np.ndarray, cap: float | None) -> np.ndarray:
    """Logits from products."""
    return products if cap is None else (cap * np.tanh(products / cap)).astype(np.float32)


def rebuilt(fitted: FittedSketch, source: np.ndarray, step: float) -> np.ndarray:
    """Rows of logits, up to a constant each, from rounded coordinates of `source` (states or logits)."""
    y = source @ fitted.map.projection.T + fitted.map.offset
    return (step * np.round(y / step)) @ fitted.components.T + fitted.mean


def divergence(logits: np.ndarray, tail: np.ndarray, temperature: float) -> float:
    """Mean KL of targets with the exact head and tail mass, and the tail's shape as rebuilt."""
    exact = softmax(logits, temperature).astype(np.float64)
    outside = np.ones(logits.shape, np.bool_)
    np.put_along_axis(outside, np.argpartition(logits, -K, axis=1)[:, -K:], False, axis=1)
    shape = softmax(np.where(outside, tail, -1e30).astype(np.float32), temperature) * outside
    mass = (exact * outside).sum(axis=1, keepdims=True)
    found = np.maximum(mass * shape, 1e-30)
    return float((np.where(outside, exact * (np.log(exact + 1e-300) - np.log(found)), 0)).sum(axis=1).mean())


def measure(cap: float, rank: int, step: float) -> dict[str, list[float]]:
    """KL at every temperature of each kind of sketch."""
    weight, hidden = data()
    products = hidden @ weight.T
    fit_on, held = slice(0, ROWS), slice(ROWS, None)

    def linear(logits: np.ndarray) -> FittedSketch:
        moments = Moments.of(hidden[fit_on], V).meaning(meant_tokens(logits[fit_on]))
        return fit_basis_linear(moments, weight, rank=rank)

    def compared(logits: np.ndarray, tail: np.ndarray) -> list[float]:
        return [divergence(logits[held], tail, t) for t in TEMPERATURES]

    logits = capped(products, cap)
    plain, before = linear(products), linear(logits)
    after = fit_basis_logits(lambda: [logits[fit_on]], rank=rank)
    again = rebuilt(before, hidden[held], step)
    constant = (products[held] - again).mean(axis=1, keepdims=True)
    return {
        "no cap": compared(products, rebuilt(plain, hidden[held], step)),
        f"cap {cap:g}, basis of the logits": compared(logits, rebuilt(after, logits[held], step)),
        f"cap {cap:g}, basis of the products": compared(logits, capped(again + constant, cap)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cap", type=float, default=30.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--step", type=float, default=0.5, help="of the coordinates, in weighted logits")
    args = parser.parse_args()
    weight, hidden = data()
    largest = np.abs(hidden[ROWS:] @ weight.T).max(axis=1)
    print(f"largest product of a row: median {np.median(largest):.1f}, of all {largest.max():.1f}")
    print(f"{'KL(teacher || rebuilt), nats':36s} " + "".join(f"{f'T = {t:g}':>9s}" for t in TEMPERATURES))
    for name, values in measure(args.cap, args.rank, args.step).items():
        print(f"{name:36s} " + "".join(f"{value:9.4f}" for value in values))


if __name__ == "__main__":
    main()

"""Fused kernels for cached distillation: one body each, compiled for Metal, CUDA or (in tests) the host.

Callers need not know which back end runs: each function falls back to plain MLX operations with the same
meaning. Memory: no array of [tokens, V] besides the inputs and the gradient.
"""

from pmetal_distill.kernels.capture import Captured, capture
from pmetal_distill.kernels.dispatch import VARIABLE, Backend, backend, engaged, reset_engaged
from pmetal_distill.kernels.hidden import HiddenSums, hidden_sums
from pmetal_distill.kernels.pair import PairDivergence, PairStats, pair_divergence, pair_stats
from pmetal_distill.kernels.row import RowStats, row_stats

__all__ = [
    "VARIABLE",
    "Backend",
    "Captured",
    "HiddenSums",
    "PairDivergence",
    "PairStats",
    "RowStats",
    "backend",
    "capture",
    "engaged",
    "hidden_sums",
    "pair_divergence",
    "pair_stats",
    "reset_engaged",
    "row_stats",
]

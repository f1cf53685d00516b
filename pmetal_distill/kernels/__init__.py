"""Fused kernels for cached distillation: one body each, compiled for Metal, CUDA or (in tests) the host.

`ops` serves the losses, `capture` stage one, `hidden_sums` the hidden-state losses. Each falls back to plain
MLX operations of the same meaning where no kernel can run: callers need not know which back end they get.
Memory: no array of [tokens, V] besides the inputs and the gradient.
"""

from pmetal_distill.kernels.capture import Captured, capture
from pmetal_distill.kernels.dispatch import VARIABLE, Backend, backend, engaged, reset_engaged
from pmetal_distill.kernels.hidden import HiddenSums, hidden_sums

__all__ = [
    "VARIABLE",
    "Backend",
    "Captured",
    "HiddenSums",
    "backend",
    "capture",
    "engaged",
    "hidden_sums",
    "reset_engaged",
]

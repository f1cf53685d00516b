"""Liger's Triton kernels on the sizes of `benchmarks/kernels.py`, if torch with a GPU and it are there."""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.kernel_cases import TEMPERATURE


def run(rows: int, vocab: int, report: Callable[[str, str, float], None]) -> None:
    """Times cross-entropy, dense KL and dense JSD, forward and backward.

    Args:
        rows: tokens.
        vocab: V.
        report: called as report(name, dtype, seconds).
    """
    torch = _torch()
    if torch is None:
        return
    for dtype, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        z, cases = _cases(torch, rows, vocab, kind)
        for name, loss in cases.items():
            try:
                report(name, dtype, _seconds(torch, loss, z))
            except (RuntimeError, TypeError) as error:
                print(f"liger {name} {dtype}: {str(error)[:300]}", flush=True)
        del z, cases, loss
        torch.cuda.empty_cache()


def _torch() -> Any:
    """torch, where it sees a GPU and Liger is there; else says what is missing."""
    try:
        import liger_kernel.ops.cross_entropy
        import liger_kernel.ops.jsd
        import liger_kernel.ops.kl_div  # noqa: F401
        import torch
    except ImportError as error:
        print(f"liger: left out ({error})", flush=True)
        return None
    if not torch.cuda.is_available():
        print("liger: left out (torch sees no GPU)", flush=True)
        return None
    return torch


def _cases(torch: Any, rows: int, vocab: int, kind: Any) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """Student logits of a type, and losses of them by name."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.jsd import LigerJSDFunction
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction

    def log_softmax(x: Any) -> Any:
        return torch.log_softmax(x / TEMPERATURE, -1)

    z = torch.randn(rows, vocab, device="cuda", dtype=kind).requires_grad_()
    t = torch.randn(rows, vocab, device="cuda", dtype=kind)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    return z, {
        "cross-entropy forward + backward (hard only)": lambda: _first(
            LigerCrossEntropyFunction.apply(z, labels, None)
        ),
        "dense KL forward + backward": lambda: LigerKLDivLossFunction.apply(
            log_softmax(z), log_softmax(t), "batchmean", True, 1e-10
        ),
        "dense JSD forward + backward": lambda: LigerJSDFunction.apply(
            log_softmax(z), log_softmax(t), None, 0.5
        ),
    }


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _seconds(torch: Any, loss: Callable[[], Any], z: Any) -> float:
    runs = []
    for turn in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss().backward()
        end.record()
        torch.cuda.synchronize()
        z.grad = None
        if turn:
            runs.append(start.elapsed_time(end) / 1e3)
    return statistics.median(runs)

"""What `pmetal-pipeline --version -v` tells: the back end and the versions that a bug report needs."""

import platform
from importlib.metadata import PackageNotFoundError, version

from pipeline.console import aligned

LIBRARIES = ("mlx", "mlx-lm", "numpy", "pyarrow", "zstandard", "transformers", "safetensors")


def version_line() -> str:
    return f"pmetal-pipeline {installed_version('pmetal-distill')}"


def report() -> str:
    """The version with back end, BLAS, kernels and library versions, one a line. Imports MLX."""
    import pmetal_distill
    from pmetal_distill import _blas
    from pmetal_distill.kernels import backend
    from pmetal_distill.precision import policy_text

    blas = "not needed" if not _blas.needs_preload() else pmetal_distill.BLAS or "none: " + _blas.HINT
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(),
        "kernels": backend(),
        "BLAS": blas,
        "precision": policy_text(),
    }
    return "\n".join(
        [version_line(), aligned([*facts.items(), *((name, installed_version(name)) for name in LIBRARIES)])]
    )


def _device() -> str:
    import mlx.core as mx

    return str(mx.default_device())


def installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def missing_blas() -> str | None:
    """What to tell a user whose matrix products are slow for want of OpenBLAS; None if they are not."""
    import pmetal_distill
    from pmetal_distill import _blas

    return _blas.HINT if _blas.needs_preload() and pmetal_distill.BLAS is None else None

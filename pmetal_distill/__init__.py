"""pmetal_distill: the library under the pipeline.

Importing it costs one dlopen (see `_blas`); MLX itself is imported by the submodules, on first use.
"""

from pmetal_distill import _blas

BLAS = _blas.preload()

"""Kernel tests run bodies under the emulation, which needs a C++ compiler on the host."""

from collections.abc import Iterator

import pytest

from pmetal_distill.kernels import reset_engaged
from tests.kernels.host.builder import compiler


@pytest.fixture(autouse=True)
def _fresh_counts() -> Iterator[None]:
    """Counts of engaged kernels start at zero."""
    if compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to emulate kernels with")
    reset_engaged()
    yield
    reset_engaged()

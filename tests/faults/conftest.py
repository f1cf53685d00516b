"""The small caches of tests/pmetal_distill/offline, and one pristine cache for all tests of this folder."""

import sys
from pathlib import Path

import pytest

OFFLINE = Path(__file__).parents[1] / "pmetal_distill" / "offline"
sys.path.insert(0, str(OFFLINE))

from tests.faults.world import World  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every kind of file: targets with a sketch, a codebook, hidden states in a basis, a tokenizer."""
    return World(tmp_path_factory.mktemp("world") / "pristine")

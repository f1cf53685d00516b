import sys
from pathlib import Path

import pytest

from pmetal_distill.offline.reader import LogitCache

sys.path.insert(0, str(Path(__file__).parent))

from caches import hidden_spec, make_dataset, write_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("cache") / "c", make_dataset(hidden=hidden_spec()))


@pytest.fixture
def cache(folder):
    return LogitCache(folder)

"""The public surface: which names, that they exist, and that each is documented."""

import inspect
import operator
import subprocess
import sys

import pytest

import pmetal_distill
from pmetal_distill import offline

PUBLIC = [
    "AlphaSchedule",
    "DistillConfig",
    "Distiller",
    "Divergence",
    "HiddenStateLoss",
    "JensenShannonLoss",
    "KLDivergenceLoss",
    "LoadedModel",
    "LogitCache",
    "LossParts",
    "SoftCrossEntropyLoss",
    "TeacherTarget",
    "TemperatureSchedule",
    "init_student",
    "load_model",
    "save_model",
]


def test_the_names_are_these() -> None:
    assert pmetal_distill.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(pmetal_distill))


@pytest.mark.parametrize("name", [*PUBLIC, *(f"offline.{name}" for name in offline.__all__)])
def test_each_exists_and_is_documented(name: str) -> None:
    thing = operator.attrgetter(name)(pmetal_distill)
    name = thing.__name__
    assert len(inspect.getdoc(thing) or "") > 25
    methods = [m for n, m in inspect.getmembers(thing, inspect.isfunction) if not n.startswith("_")]
    own = [
        m
        for m in methods
        if (m.__module__ or "").startswith("pmetal_distill") and m.__qualname__.startswith(name)
    ]
    assert [m.__qualname__ for m in own if not inspect.getdoc(m)] == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Destiller'"):
        pmetal_distill.Destiller  # noqa: B018
    with pytest.raises(AttributeError, match=r"'pmetal_distill\.offline' has no attribute 'LogitCash'"):
        offline.LogitCash  # noqa: B018


def test_what_a_user_of_a_cache_needs_is_offered() -> None:
    assert {"Batch", "CacheWriter", "CachedTeacher", "LogitCache", "verify_cache"} <= set(offline.__all__)
    assert set(offline.__all__) <= set(dir(offline))


def test_importing_the_package_imports_no_mlx() -> None:
    code = "import sys, pmetal_distill.offline; sys.exit(any(name.startswith('mlx') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

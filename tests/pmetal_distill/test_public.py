"""The public surface: which names, that they exist, and that each is documented."""

import inspect
import subprocess
import sys

import pytest

import pmetal_distill

PUBLIC = [
    "AlphaSchedule",
    "DistillConfig",
    "Distiller",
    "Divergence",
    "HiddenStateLoss",
    "LoadedModel",
    "LogitCache",
    "LossParts",
    "TeacherTarget",
    "TemperatureSchedule",
    "init_student",
    "load_model",
    "save_model",
]


def test_the_names_are_these() -> None:
    assert pmetal_distill.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(pmetal_distill))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_exists_and_is_documented(name: str) -> None:
    thing = getattr(pmetal_distill, name)
    assert len(inspect.getdoc(thing) or "") > 30
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


def test_importing_the_package_imports_no_mlx() -> None:
    code = "import sys, pmetal_distill; sys.exit(any(name.startswith('mlx') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A user's own files named as our packages, beside a script or in the current folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(params=["schemas.py", "pipeline.py", "schemas/__init__.py"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / request.param).parent.mkdir(exist_ok=True)
    (tmp_path / request.param).write_text("MINE = 1\n")
    return tmp_path


def test_a_script_beside_them_works(folder: Path) -> None:
    (folder / "script.py").write_text(
        "from pmetal_distill import DistillConfig\nprint(DistillConfig().alpha)\n"
    )
    done = run(folder, "script.py")
    assert (done.returncode, done.stdout) == (0, "0.5\n"), done.stderr


def test_the_command_line_works_beside_them(folder: Path) -> None:
    done = run(folder, "-m", "pmetal_distill", "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "pmetal-pipeline train" in done.stdout


def test_one_that_is_imported_already_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "schemas.py").write_text("MINE = 1\n")
    (tmp_path / "script.py").write_text("import schemas\nimport pmetal_distill\n")
    done = run(tmp_path, "script.py")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"ImportError: pmetal_distill: 'schemas' must be the package that comes with it, found "
        f"{tmp_path / 'schemas.py'} imported under that name; rename that file, or import pmetal_distill "
        "before it"
    )


@pytest.mark.parametrize("package", ["pmetal_distill", "pipeline"])
def test_the_packages_run_as_the_command(package: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-m", package, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pmetal-pipeline ")

"""What the command refuses, what it replaces, what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.console import Console
from pipeline.reporting import images
from pipeline.reporting.axes import Axis
from pipeline.reporting.figures import Figure, line_figure
from pipeline.reporting.lines import Series
from pipeline.reporting.places import shown
from tests.pipeline.conftest import Cli


def figure() -> Figure:
    return line_figure("f", "F", [Series("a", [(0.0, 1.0)])], Axis("x"), Axis("y"), description="d")


def test_a_folder_that_is_neither(cli: Cli, tmp_path: Path) -> None:
    got = cli("report", tmp_path, "--out", tmp_path / "r.html")
    assert got.code == 2
    assert "must be a cache (dataset.json) or a run (metrics.jsonl)" in got.err
    (tmp_path / "run").mkdir()
    assert f"give '{tmp_path / 'run'}'" in cli("report", tmp_path, "--out", tmp_path / "r.html").err


def test_only_an_earlier_report_is_replaced(cli: Cli, bucket_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r.html"
    assert cli("report", bucket_cache, "--out", out).code == 0
    assert cli("report", bucket_cache, "--out", out).code == 0
    assert [path.name for path in out.parent.iterdir()] == ["r.html"]
    out.write_text("<!doctype html><p>mine")
    got = cli("report", bucket_cache, "--out", out)
    assert got.code == 2
    assert "must be new or an earlier report" in got.err
    assert out.read_text() == "<!doctype html><p>mine"
    assert "found a folder" in cli("report", bucket_cache, "--out", tmp_path).err


def test_options_for_the_other_kind(cli: Cli, bucket_cache: Path, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert "--eval: goes with a run" in cli("report", bucket_cache, "--out", out, "--eval", "e.json").err
    assert "--plan: goes with a cache" in cli("report", run_folder, "--out", out, "--plan", "p.json").err


def test_figures_are_written_beside(
    cli: Cli, bucket_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_browser", lambda: None)
    got = cli("report", bucket_cache, "--out", tmp_path / "r.html", "--figures", tmp_path / "f", "--json")
    assert got.code == 0, got.err
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert names == ["bytes.svg", "entropy.svg", "tail-mass.svg"]
    assert sorted(Path(path).name for path in got.json["figures"]) == names
    assert got.json["skipped"]["png"] == "no Chromium is installed"


def test_a_browser_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_browser", lambda: sys.executable)
    names, reason = images.write_figures([figure()], tmp_path, Console(quiet=True))
    assert names == ["f.svg"]
    assert "failed with exit code" in reason


def test_png_of_a_figure(tmp_path: Path) -> None:
    if images.find_browser() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    names, reason = images.write_figures([figure()], tmp_path, Console(quiet=True))
    assert (names, reason) == (["f.svg", "f.png"], "")
    header = (tmp_path / "f.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    size = (int.from_bytes(header[16:20]), int.from_bytes(header[20:24]))
    assert size == tuple(2 * n for n in figure().file_size)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(['report', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = [n for n in ('mlx', 'mlx_lm', 'transformers', 'pyarrow') if n in sys.modules]\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--figures" in done.stdout


def test_a_cache_behind_a_url_without_its_credentials(
    cli: Cli, bucket_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMETAL_HOME", str(tmp_path / "home"))
    got = cli("report", f"file://{bucket_cache}", "--out", tmp_path / "r.html", "--json")
    assert got.code == 0, got.err
    assert got.json["kind"] == "cache"
    assert f"file://{bucket_cache}" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("s3://key:secret@bucket/folder?token=abc", "s3://bucket/folder"),
        ("hf://datasets/name", "hf://datasets/name"),
        ("folder/what?.txt", "folder/what?.txt"),
        (12, "12"),
    ],
)
def test_places_are_shown_without_credentials(place: object, text: str) -> None:
    assert shown(place) == text

"""Figures as files: SVG always, PNG where a Chromium is installed. Costs about a second a PNG."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline.console import Console
from pipeline.reporting.figures import Figure

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC_BROWSERS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_SCALE = 2
_SECONDS = 60


def write_figures(figures: Sequence[Figure], folder: Path, console: Console) -> tuple[list[str], str]:
    """Writes every figure.

    Args:
        figures: to write, by their names.
        folder: made if it is missing; files of the same names are replaced.
        console: where progress goes.

    Returns:
        the names of the files, and why there is no PNG, or "".
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    browser, reason = find_browser(), ""
    with console.progress("figures", total=len(figures), unit="figures") as progress:
        for figure in figures:
            path = folder / f"{figure.name}.svg"
            path.write_text(figure.file(), encoding="utf-8")
            names.append(path.name)
            if browser and not reason:
                reason = _photograph(browser, figure, path)
                names += [] if reason else [f"{figure.name}.png"]
            progress.advance(1)
    return names, reason or ("" if browser else "no Chromium is installed")


def find_browser() -> str | None:
    """A browser that can run without a screen."""
    found = (shutil.which(name) for name in BROWSERS)
    mac = (path for path in MAC_BROWSERS if sys.platform == "darwin" and Path(path).exists())
    return next((path for path in (*found, *mac) if path), None)


def browser_command(browser: str, profile: str) -> list[str]:
    """The browser without a screen, a network or a profile of its own."""
    command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command += ["--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"]
    # The sandbox refuses to run as root, as in containers.
    return [*command, "--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else command


def _photograph(browser: str, figure: Figure, svg: Path) -> str:
    """Makes the PNG beside an SVG; says why if it cannot."""
    width, height = figure.file_size
    with tempfile.TemporaryDirectory() as profile:
        command = [
            *browser_command(browser, profile),
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={_SCALE}",
            f"--screenshot={svg.with_suffix('.png').resolve()}",
            svg.resolve().as_uri(),
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{browser} failed: {error}"
    if done.returncode or not svg.with_suffix(".png").exists():
        return f"{browser} failed with exit code {done.returncode}"
    return ""

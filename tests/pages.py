"""Runs what the documentation shows: its code blocks, as they stand."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page: str, language: str) -> list[str]:
    """The contents of the fenced blocks of a page in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run_python(block: str, places: Mapping[str, Path], *, page: str) -> dict[str, object]:
    """Executes a block with its paths pointed elsewhere; its names.

    Args:
        block: Python.
        places: path in the block -> real path.
        page: for messages.
    """
    for shown, real in places.items():
        block = block.replace(shown, str(real))
    names: dict[str, object] = {}
    exec(compile(block, page, "exec"), names)  # noqa: S102 - our own documentation
    return names


def run_shell(scripts: Sequence[str], folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Executes blocks one after another in one shell that stops at the first failure.

    Returns:
        what each block printed, stdout and stderr as they came.

    Raises:
        AssertionError: a command failed; with all that was printed.
    """
    mark = "=== block "
    script = "\n".join(f"echo '{mark}{number}'\n{block}" for number, block in enumerate(scripts))
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=folder,
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}"
    return re.split(rf"^{mark}\d+\n", done.stdout, flags=re.MULTILINE)[1:]

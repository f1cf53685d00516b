"""Completion as docs/reference.md tells to switch it on, in a real bash."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.reference.sources import ROOT

PAGE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
LINES = dict(re.findall(r"^\| (bash|zsh|fish) \| `(.+?)` \|", PAGE, re.MULTILINE))
BASH = shutil.which("bash")
SCRIPTS = Path(sys.executable).parent
needs_bash = pytest.mark.skipif(BASH is None, reason="no bash")

# What readline does: the words in COMP_WORDS, then the function, which leaves its answer in COMPREPLY.
# Outside of readline compopt has nothing to change; what it is asked for is noted.
DRIVER = """
compopt() {{ local IFS=' '; echo "compopt $*"; }}
{line}
COMP_WORDS=({words})
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
COMPREPLY=()
_pmetal_pipeline_completion pmetal-pipeline
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    surroundings = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)


@pytest.fixture
def complete() -> Callable[[str], list[str]]:
    def answers(words: str) -> list[str]:
        assert BASH is not None
        done = run([BASH, "--norc", "-c", DRIVER.format(line=LINES["bash"], words=words)])
        assert done.stderr == ""
        return done.stdout.split("\n")[:-1]

    return answers


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pmetal-pipeline ca", ["cache"]),
        ("pmetal-pipeline cache --ta", ["--tail"]),
        ("pmetal-pipeline cache --tail s", ["sketch"]),
        ("pmetal-pipeline train --max-s", ["--max-seq-len", "--max-seq-length"]),
        ("pmetal-pipeline re", ["repair", "report"]),
    ],
)
def test_bash_completes(words: str, expected: list[str], complete: Callable[[str], list[str]]) -> None:
    assert complete(words) == expected


@needs_bash
@pytest.mark.parametrize(
    "words",
    ["cache --data run", "train --cache run", "eval run", "verify run", "cache --out run", "inspect run"],
)
def test_bash_completes_paths(words: str, complete: Callable[[str], list[str]]) -> None:
    assert "compopt -o default" in complete(f"pmetal-pipeline {words}")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_get_a_script(shell: str) -> None:
    assert f"_PMETAL_PIPELINE_COMPLETE={shell}_source pmetal-pipeline" in LINES[shell]
    done = run([str(SCRIPTS / "pmetal-pipeline")], _PMETAL_PIPELINE_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "pmetal_pipeline_completion" in done.stdout


def test_completing_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main([])\nexcept SystemExit:\n    pass\n"
        "heavy = {'mlx', 'mlx_lm', 'pyarrow', 'rich'} & {name.partition('.')[0] for name in sys.modules}\n"
        "print(heavy or 'light')"
    )
    words = {"COMP_WORDS": "pmetal-pipeline cache --ta", "COMP_CWORD": "2"}
    done = run([sys.executable, "-c", code], _PMETAL_PIPELINE_COMPLETE="bash_complete", **words)
    assert done.stdout.splitlines()[-1] == "light", done.stdout + done.stderr
    assert "plain,--tail" in done.stdout

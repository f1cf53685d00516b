"""`python -m tools.tree`: writes the file tree of docs/architecture.md out of the modules' docstrings.

With --check only says whether it is as the code is. A file's purpose is the first sentence of its docstring.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("schemas", "pmetal_distill", "pipeline")
BLOCK = re.compile(r"(?<=<!-- written by `python -m tools.tree` -->\n```\n).*?(?=```\n)", re.DOTALL)
OTHER = {
    "schemas/FORMAT.md": "the format, byte by byte",
    "pmetal_distill/kernels/src": "the kernels' bodies, and a prelude for each back end",
    "pipeline/reporting/assets": "style and script of the report",
}


def tree() -> str:
    """A line for every folder and file of the packages."""
    return "".join(line for package in PACKAGES for line in _folder(ROOT / package, 0))


def _folder(folder: Path, depth: int) -> Iterator[str]:
    name = folder.relative_to(ROOT).as_posix()
    start = folder / "__init__.py"
    yield _line(f"{folder.name}/", depth, OTHER[name] if name in OTHER else purpose(start))
    if name in OTHER:
        return
    inside = [path for path in folder.iterdir() if path.name != "__pycache__" and path != start]
    for path in sorted(inside, key=lambda path: (path.is_dir(), path.name)):
        other = path.relative_to(ROOT).as_posix()
        if path.is_dir():
            yield from _folder(path, depth + 1)
        elif path.suffix == ".py":
            yield _line(path.name, depth + 1, purpose(path))
        elif other in OTHER:
            yield _line(path.name, depth + 1, OTHER[other])


def purpose(file: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", paragraph)[0].rstrip(".")


def _line(name: str, depth: int, words: str) -> str:
    return f"{'    ' * depth}{name:<{32 - 4 * depth}}{words}\n"


def main(arguments: list[str]) -> int:
    """Writes the tree. Exit code 1 with --check if it was not as the code."""
    text = PAGE.read_text(encoding="utf-8")
    wanted = BLOCK.sub(lambda _: tree(), text)
    if wanted == text:
        return 0
    if "--check" in arguments:
        print(f"{PAGE.relative_to(ROOT)}: is not as the code")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

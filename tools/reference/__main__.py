"""`python -m tools.reference`: writes both pages; with --check only says whether they are as the code is."""

import sys
from pathlib import Path

from tools.reference import pages
from tools.reference.sources import ROOT, Sources

DOCS = ROOT / "docs"


def written() -> dict[Path, str]:
    """The pages as they should be."""
    sources = Sources.read()
    return {
        DOCS / "reference.md": pages.reference(sources),
        DOCS / "reference-errors.md": pages.errors(sources),
    }


def main(arguments: list[str]) -> int:
    """Writes the pages. Exit code 1 with --check if one differs."""
    stale = [path for path, text in written().items() if not path.exists() or path.read_text("utf-8") != text]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(written()[path], encoding="utf-8")
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not as the code' if '--check' in arguments else 'written'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m tests.zoo [NAME ...]`: every architecture through everything. About two minutes on two cores."""

import argparse
import logging
import tempfile
from pathlib import Path

from tests.zoo.configs import architectures
from tests.zoo.sweep import Row, try_architecture
from tests.zoo.table import page, summary


def main() -> int:
    """Prints a line for each; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all that mlx-lm ships if none is named")
    parser.add_argument("--write", type=Path, help="write the table, docs/models.md")
    wanted = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it does not know most of these configurations
    rows: list[Row] = []
    for name in wanted.names or architectures():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(try_architecture(name, Path(folder)))
        print(summary(rows[-1]), flush=True)
    if wanted.write is not None:
        wanted.write.write_text(page(rows))
    failed = [row.name for row in rows if row.failures]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} without a failure"
        + (f"; not {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The sweep's rows as lines, and as the page docs/models.md."""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from tests.zoo.configs import ELSEWHERE
from tests.zoo.sweep import NOT_IN_MLX_LM, Row

COLUMNS = ("architecture", "loads", "splits", "packs", "exact", "full", "LoRA", "init-student")
_HEAD = """# Models

Every architecture that mlx-lm {version} ships, built with four layers of width 32 and random weights, and
taken through the commands themselves by `python -m tests.zoo --write docs/models.md` (minutes on two CPU
cores; a dozen of them run in the test suite). {summary}

**splits**: the head is a *matrix* that was found, so that logits exist for a chunk of tokens at a time; else
the model's own *head* or its *full call* gives those of a whole batch, which is slower. **packs**: documents
share a sequence under one mask for the *batch*, or one for each of its *rows*; else each has its own.
**exact**: largest difference, in nats, of cached log-probabilities of the eight first choices from what
mlx-lm gives for each document alone; the cache rounds to 1/128. **full**, **LoRA** (of every linear layer):
two steps from the cache change the weights, or mlx-lm itself cannot train it so. **init-student**: half of
the layers load and run.

"""


def summary(row: Row) -> str:
    """One line, and one for each failure."""
    lines = [f"{row.name:20} " + " ".join(f"{cell:>13}" for cell in _cells(row))]
    lines += [f"    {column}: {why}" for column, why in row.failures.items()]
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> str:
    """docs/models.md."""
    head = _HEAD.format(version=version("mlx-lm"), summary=_summary(rows))
    table = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    table += [f"| {row.name} | {' | '.join(_cells(row))} |" for row in rows]
    reasons = [f"- {why}: {', '.join(names)}." for why, names in _why_unpacked(rows).items()]
    elsewhere = [f"- {name}: {why}." for name, why in ELSEWHERE.items()]
    parts = ["\n".join(table), "Not packed, because\n" + "\n".join(reasons)]
    parts.append("Not built here:\n" + "\n".join(elsewhere))
    return head + "\n\n".join(parts) + "\n"


def table_of(text: str) -> Mapping[str, tuple[str, ...]]:
    """The table of a page: architecture -> its other cells."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: tuple(cells) for name, *cells in rows if name != COLUMNS[0]}


def cells_of(row: Row) -> tuple[str, ...]:
    """The row as `table_of` gives it."""
    return tuple(_cells(row))


def _cells(row: Row) -> list[str]:
    packs = "no" if row.packs == "none" else row.packs
    found = [row.loads, row.splits, packs, row.exact, row.full, row.lora, row.student]
    return ["FAILED" if cell.startswith("!") else cell or "-" for cell in found]


def _summary(rows: Sequence[Row]) -> str:
    whole = [row for row in rows if not row.failures and NOT_IN_MLX_LM not in (row.full, row.lora)]
    return f"{len(whole)} of {len(rows)} do everything."


def _why_unpacked(rows: Sequence[Row]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            if found := re.search(r"kept apart \((.*)\):", note):
                reason = re.sub(r", \w*Cache$", "", found[1])
                reasons.setdefault(reason, []).append(row.name)
    return reasons

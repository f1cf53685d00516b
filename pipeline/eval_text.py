"""The result of `eval` for people: tables of at most 80 columns. `--json` has every figure."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.console import aligned, table

WIDTH = 80
CELL = 11
MOST_ROWS = 20
GROUPS = {"by_position": "position", "by_kind": "kind"}


def evaluation_text(result: Mapping[str, Any]) -> str:
    """Single figures first, then a table for each grouping and one for the tasks."""
    parts = [aligned((name, value) for name, value in result.items() if not isinstance(value, list | dict))]
    parts += [_grouped(result[name], label) for name, label in GROUPS.items() if name in result]
    if "tasks" in result:
        rows = [
            [f"{task} {metric}", value]
            for task, metrics in result["tasks"].items()
            for metric, value in metrics.items()
            if isinstance(value, int | float)
        ]
        parts.append(table(["task", "value"], rows))
    return "\n\n".join(parts)


def _grouped(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """The largest groups, in the order given."""
    kept = sorted(rows, key=lambda row: -row["tokens"])[:MOST_ROWS]
    temperatures = [name for name in rows[0] if name.startswith("kl@")][:3]
    columns = ["tokens", *temperatures, "top1", "perplexity"]
    room = WIDTH - CELL * len(columns)
    shown = [
        [_shortened(str(row[label]), room), *(row.get(name, "-") for name in columns)]
        for row in rows
        if row in kept
    ]
    text = table([label, *columns], shown)
    return text if len(kept) == len(rows) else f"{text}\n{len(rows) - len(kept)} smaller ones in --json"


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else f"...{name[3 - room :]}"

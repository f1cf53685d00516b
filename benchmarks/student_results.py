"""What `student_quality` compares and writes down: rows, the results file, tables over seeds."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.console import table

METRICS = ("kl@1", "kl@2", "top1")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to train. Rows of a group share everything but the target; the first is what others go by."""

    group: str
    name: str
    target: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"


@dataclass(slots=True, eq=False)
class Results:
    """The results file: written after every row."""

    path: Path
    setup: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    epoch: dict[str, float] | None = None

    @staticmethod
    def open(path: Path, setup: dict[str, Any]) -> "Results":
        """What the file holds, if it is there."""
        if not path.exists():
            return Results(path, setup, {})
        found = json.loads(path.read_text())
        if found["setup"] != setup:
            differing = sorted(k for k in setup | found["setup"] if setup.get(k) != found["setup"].get(k))
            raise SystemExit(f"{path}: was made with other {', '.join(differing)}; give another --work")
        return Results(path, setup, found["rows"], found["epoch"])

    def save(self) -> None:
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps({"setup": self.setup, "rows": self.rows, "epoch": self.epoch}, indent=2))
        draft.replace(self.path)


def means(results: Results, row: Row, text: str, seeds: Sequence[int]) -> dict[str, list[float]]:
    """Figures of a row by metric, a value a seed."""
    found = [results.rows[f"{row.key}, seed {seed}"]["held_out"][text] for seed in seeds]
    return {metric: [values[metric] for values in found] for metric in METRICS}


def tables(results: Results, rows: Sequence[Row], text: str, seeds: Sequence[int]) -> Iterator[str]:
    """A table a group: means over seeds, and the ratio of KL to the group's first row, seed by seed."""
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        first = means(results, members[0], text, seeds)
        lines = []
        for row in members:
            found = means(results, row, text, seeds)
            ratios = [
                statistics.mean(a / b for a, b in zip(found[m], first[m], strict=True)) for m in METRICS[:2]
            ]
            size = results.rows[f"{row.key}, seed {seeds[0]}"]["bytes_per_token"]
            lines.append(
                [
                    row.name,
                    "-" if size is None else f"{size:.1f}",
                    *(statistics.mean(found[m]) for m in METRICS),
                    *(f"{ratio:.3f}" for ratio in ratios),
                ]
            )
        header = [f"{group}; {text}", "B/token", "KL T=1", "KL T=2", "top-1", "ratio T=1", "T=2"]
        yield "\n".join(
            [table(header, lines), *(by_seed(results, members, text, seeds) if seeds[1:] else [])]
        )


def by_seed(results: Results, members: Sequence[Row], text: str, seeds: Sequence[int]) -> Iterator[str]:
    """The ratios of each seed, a line a row."""
    first = means(results, members[0], text, seeds)
    for row in members[1:]:
        found = means(results, row, text, seeds)
        for metric in METRICS[:2]:
            ratios = [f"{a / b:.3f}" for a, b in zip(found[metric], first[metric], strict=True)]
            yield f"{row.name}: ratios of {metric} by seed {', '.join(ratios)}"

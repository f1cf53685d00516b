"""What a command says: results on stdout, progress and remarks on stderr. Cheap to import; rich comes on use.

One `Console` is made per command. `--json` makes the result one JSON object on stdout, `--quiet` silences
stderr.
"""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Progress(Protocol):
    """A running task: `advance` by finished units, `tell` a short changing remark beside the bar."""

    def advance(self, units: float) -> None: ...

    def tell(self, remark: str) -> None: ...


class _Silent:
    def advance(self, units: float) -> None:
        pass

    def tell(self, remark: str) -> None:
        pass


@dataclass(slots=True)
class _Bar:
    bar: Any
    task: Any

    def advance(self, units: float) -> None:
        self.bar.advance(self.task, units)

    def tell(self, remark: str) -> None:
        self.bar.update(self.task, remark=remark)


@dataclass(slots=True)
class _Lines:
    """For logs that are no terminal: a line when a task ends and at most one every half minute."""

    label: str
    total: float
    unit: str
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0
    last: float = field(default_factory=time.monotonic)
    remark: str = ""

    def advance(self, units: float) -> None:
        self.done += units
        if time.monotonic() - self.last > 30:
            self.write()

    def tell(self, remark: str) -> None:
        self.remark = remark
        self.advance(0)

    def write(self) -> None:
        self.last = time.monotonic()
        rate = self.done / max(self.last - self.started, 1e-9)
        line = f"{self.label}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {rate:,.1f}/s {self.remark}"
        print(line.rstrip(), file=sys.stderr, flush=True)


@dataclass(slots=True)
class Console:
    """Where a command's words go.

    Args:
        as_json: print the result as one JSON object instead of a table.
        quiet: say nothing on stderr but errors.
    """

    as_json: bool = False
    quiet: bool = False

    def note(self, text: str) -> None:
        """A remark for the person watching, on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    @contextmanager
    def progress(self, label: str, *, total: float, unit: str) -> Iterator[Progress]:
        """A progress bar with rate and time left while the block runs."""
        if self.quiet:
            yield _Silent()
        elif not sys.stderr.isatty():
            lines = _Lines(label, total, unit)
            yield lines
            lines.write()
        else:
            yield from self._bar(label, total, unit)

    def _bar(self, label: str, total: float, unit: str) -> Iterator[Progress]:
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[remark]}"),
        )
        with RichProgress(*columns, console=RichConsole(stderr=True)) as bar:
            yield _Bar(bar, bar.add_task(label, total=total, remark=""))

    def result(self, data: Mapping[str, Any], text: str | None = None) -> None:
        """The command's outcome: `data` under --json, else `text` (or `data` as aligned lines)."""
        if self.as_json:
            print(json.dumps(data, indent=2, sort_keys=False, default=str))
        else:
            print(printable(text if text is not None else aligned(data.items())))


def printable(text: str) -> str:
    """Text of strangers without the characters that a terminal obeys or that reorder a line."""
    return _OBEYED.sub(lambda found: repr(found.group())[1:-1], text)


def aligned(pairs: Any) -> str:
    """Lines of `name  value` with the values in one column."""
    rows = [(str(name), _cell(value)) for name, value in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table; the first column to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = f"{row[0]:<{widths[0]}}"
        lines.append(
            "  ".join([first, *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        )
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)

"""The files of a run, read with patience: unknown keys and an unfinished last line are ignored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.reporting.lines import Point
from pipeline.reporting.places import is_remote
from pipeline.training.finished import CONFIG, METRICS, is_finite
from pmetal_distill.plain_files import json_object, open_regular
from pmetal_distill.yaml_files import read_yaml
from schemas.errors import DataError, UsageError

MOST_POINTS = 400


@dataclass(frozen=True, slots=True)
class Metrics:
    """The curves of a run.

    Attributes:
        curves: name -> (iteration, value), ascending; values that are no finite numbers are left out.
    """

    curves: Mapping[str, list[Point]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> list[Point]:
        """A curve; empty if the run did not log it."""
        return self.curves.get(name, [])

    def last(self, name: str) -> float | None:
        """The newest value."""
        return self[name][-1][1] if self[name] else None

    def thinned(self, name: str) -> list[Point]:
        """A curve of at most `MOST_POINTS` points: means of equally many neighbours, at the last of them."""
        points = self[name]
        size = -(-len(points) // MOST_POINTS)
        groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
        return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]

    def rate(self, amount: str, over: str) -> list[Point]:
        """Growth of a total per growth of another between reports; nothing where the other did not grow."""
        totals = dict(self[over])
        pairs = [(i, value, totals[i]) for i, value in self[amount] if i in totals]
        found, before = [], (0.0, 0.0)
        for iteration, value, total in pairs:
            if total > before[1] and value >= before[0]:
                found.append((iteration, (value - before[0]) / (total - before[1])))
            before = (value, total)
        return found


def read_metrics(run: Path) -> Metrics:
    """`metrics.jsonl` of a run. A value reported twice for an iteration counts as reported last.

    Raises:
        DataError: a line other than the last is not a JSON object with an iteration.
    """
    path = run / METRICS
    if not path.is_file():
        return Metrics()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    curves: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            if number == len(lines):
                break
            raise DataError(
                f"{path}:{number}: must be a JSON object with an iteration, found {line[:60]!r}; "
                "remove the line"
            )
        for name, value in entry.items():
            if name != "iteration" and is_finite(value):
                curves.setdefault(name, {})[float(entry["iteration"])] = float(value)
    return Metrics({name: sorted(points.items()) for name, points in curves.items()})


def read_settings(run: Path) -> dict[str, Any]:
    """The settings in `config.yaml`, unchecked; empty if there is none.

    Raises:
        UsageError: it is not YAML.
    """
    return read_yaml(run / CONFIG)[0] if (run / CONFIG).is_file() else {}


def read_object(path: Path, *, printed_by: str) -> dict[str, Any]:
    """A JSON object that a command printed.

    Raises:
        UsageError: unreadable, or something else.
    """
    try:
        with open_regular(path) as file:
            return json_object(file.read())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path}: must be the JSON object that {printed_by} printed, found {error}; run it again"
        ) from error


def find_cache(settings: Mapping[str, Any], run: Path) -> str | None:
    """The cache of a run: where its settings say, or beside the run under the same name; None if gone."""
    given = settings.get("cache")
    if not given:
        return None
    if is_remote(given):
        return str(given)
    places = [Path(str(given)), run.parent / Path(str(given)).name]
    return next((str(place) for place in places if (place / "dataset.json").is_file()), None)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json_object(line.encode())
    except ValueError:
        return None
    return entry if is_finite(entry.get("iteration")) else None

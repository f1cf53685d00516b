"""What a finished run has written, by hash, and whether it is still that. Costs a read of what is checked.

hashes.json    SHA-256 by path, written when the run ends; runs without one are taken as they are
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pmetal_distill.offline.commit import hash_stream
from pmetal_distill.plain_files import json_object, open_regular
from schemas.errors import CorruptionError, DataError

CONFIG, METRICS, CHECKPOINTS, RESULT = "config.yaml", "metrics.jsonl", "checkpoints", "result.json"
HASHES = "hashes.json"
MODEL, CARD = "model", "README.md"
ADAPTER_FILES = ("adapters.safetensors", "adapter_config.json")
SMALL = (RESULT, METRICS)
TRAINED = (MODEL, *ADAPTER_FILES)
_MAX_BYTES = 1 << 26


def finish(run: Path, result: dict[str, Any]) -> None:
    """Writes the hashes of a run's files, then its result, which marks it as finished."""
    text = json.dumps(result, indent=2) + "\n"
    found = {name: _sha256(run / name) for name in _present(run, (METRICS, *TRAINED))}
    found[RESULT] = hashlib.sha256(text.encode()).hexdigest()
    _write(run / HASHES, json.dumps({"sha256": found}, indent=2) + "\n")
    _write(run / RESULT, text)


def check_run(run: Path, names: Iterable[str]) -> None:
    """Checks files of a finished run against its hashes, as far as they are there.

    `config.yaml` may be edited, as when a cache has moved, and cards are for people to write on.

    Args:
        run: its folder.
        names: of files or folders in it: SMALL, TRAINED or both.

    Raises:
        CorruptionError: names the first file that has other bytes.
    """
    if not (run / RESULT).is_file() or not (run / HASHES).is_file():
        return
    known = _read(run / HASHES).get("sha256")
    if not isinstance(known, dict):
        raise CorruptionError(f"{run / HASHES}: must have the key 'sha256', found none; {_accept(run)}")
    names = tuple(names)
    for name in sorted(name for name in known if name.split("/")[0] in names):
        found = _sha256(run / name) if (run / name).exists() else known[name]
        if found != known[name]:
            raise CorruptionError(
                f"{run / name}: must have the bytes that the run wrote, SHA-256 {str(known[name])[:16]}, "
                f"found {found[:16]}; restore it from a copy, or {_accept(run)}"
            )


def read_result(run: Path) -> dict[str, Any] | None:
    """What a finished run printed; None if it is not finished.

    Raises:
        CorruptionError: it is no such thing, or not what the run wrote.
    """
    if not os.path.lexists(run / RESULT):
        return None
    result = _read(run / RESULT)
    check_run(run, (*SMALL, *TRAINED))
    return result


def last_report(path: Path) -> dict[str, Any]:
    """The last whole training report of a metrics file; empty if there is none.

    A line that is being written is not there yet.

    Raises:
        DataError: another line is no report, or has figures that are none.
    """
    if not path.exists():
        return {}
    with open_regular(path) as file:
        lines = file.read().splitlines()
    for number in range(len(lines), 0, -1):
        try:
            report = json_object(lines[number - 1])
        except ValueError as error:
            if number == len(lines):
                continue
            raise _no_report(path, number, str(error)) from error
        if "loss" in report:
            _check_report(report, path, number)
            return report
    return {}


def is_finite(value: Any) -> bool:
    """Whether a value out of JSON is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _check_report(report: dict[str, Any], path: Path, number: int) -> None:
    needed = {"iteration", "loss", "seconds"}
    for name in sorted(needed - report.keys()):
        raise _no_report(path, number, f"no {name!r}")
    for name, value in report.items():
        if not is_finite(value):
            raise _no_report(path, number, f"{name} = {str(value)[:40]}")
    if report["iteration"] < 0 or report["iteration"] != int(report["iteration"]):
        raise _no_report(path, number, f"iteration = {report['iteration']}")


def _no_report(path: Path, number: int, found: str) -> DataError:
    must = "must be a JSON object of an iteration and finite numbers"
    return DataError(f"{path}:{number}: {must}, found {found}; remove the line")


def _present(run: Path, names: Iterable[str]) -> list[str]:
    """Paths of the files that these names stand for, without cards."""
    found = []
    for name in names:
        path = run / name
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [str(p.relative_to(run)) for p in inside if p.is_file() and p.name != CARD]
    return found


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hash_stream(file)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            return json_object(file.read(_MAX_BYTES))
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise CorruptionError(
            f"{path}: must be the JSON object that the run wrote, found {found}; restore it from a copy, or "
            "remove it and run 'pmetal-pipeline train' with the same options and --resume"
        ) from error


def _accept(run: Path) -> str:
    return f"remove {run / HASHES} to take the run as it is"


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)

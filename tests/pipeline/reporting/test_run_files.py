"""Files of runs are read with patience, but not silently wrong."""

from pathlib import Path

import pytest

from pipeline.reporting.run_files import MOST_POINTS, Metrics, read_metrics, read_object
from schemas.errors import DataError, UsageError


def metrics_of(tmp_path: Path, text: str) -> Metrics:
    (tmp_path / "metrics.jsonl").write_text(text)
    return read_metrics(tmp_path)


def test_the_last_report_of_an_iteration_counts(tmp_path: Path) -> None:
    text = (
        '{"iteration": 2, "loss": 3}\n{"iteration": 1, "loss": 9, "val_loss": 4}\n{"iteration": 2, "loss": 2}'
    )
    found = metrics_of(tmp_path, text)
    assert found["loss"] == [(1, 9), (2, 2)]
    assert found["val_loss"] == [(1, 4)]
    assert found["nothing"] == []
    assert found.last("loss") == 2


def test_an_unfinished_last_line_is_no_error(tmp_path: Path) -> None:
    assert metrics_of(tmp_path, '{"iteration": 1, "loss": 3}\n{"iteration": 2, "lo')["loss"] == [(1, 3)]


@pytest.mark.parametrize("line", ['{"iteration": 2, "lo', "[]", '{"loss": 1}', '{"iteration": NaN}'])
def test_another_damaged_line_is(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: must be a JSON object with an iteration"):
        metrics_of(tmp_path, f'{{"iteration": 1, "loss": 3}}\n{line}\n{{"iteration": 3, "loss": 3}}\n')


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    text = '{"iteration": 1, "loss": NaN, "name": "x", "flag": true, "hard": 1}\n'
    assert dict(metrics_of(tmp_path, text).curves) == {"hard": [(1.0, 1.0)]}


def test_long_curves_are_thinned_to_means() -> None:
    found = Metrics({"loss": [(float(i), float(i % 2)) for i in range(10 * MOST_POINTS)]})
    thin = found.thinned("loss")
    assert len(thin) == MOST_POINTS
    assert {value for _, value in thin} == {0.5}
    assert thin[-1][0] == 10 * MOST_POINTS - 1


def test_rates_skip_where_time_stands_still() -> None:
    found = Metrics({"tokens": [(1, 10), (2, 30), (3, 30)], "seconds": [(1, 5), (2, 5), (3, 10)]})
    assert found.rate("tokens", "seconds") == [(1, 2.0), (3, 0.0)]


def test_objects(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text('{"a": 1}')
    assert read_object(path, printed_by="eval --json") == {"a": 1}
    for content in ("[]", "{"):
        path.write_text(content)
        with pytest.raises(UsageError, match="eval --json"):
            read_object(path, printed_by="eval --json")
    with pytest.raises(UsageError, match="eval --json"):
        read_object(tmp_path / "none.json", printed_by="eval --json")

"""`plan` against the caches that its commands then make."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.planning import Grid, command_of
from pipeline.settings import CacheSettings
from schemas.errors import UsageError
from tests.pipeline.conftest import Cli

GRID = ("--tail", "sketch,bucket", "--top-k", "8,16", "--sketch-rank", "8,24", "--sketch-step", "0.5,2")
SMALL = ("--max-seq-len", 64, "--batch-size", 4, "--calibration-tokens", 900, "--sequences-per-shard", 8)


@pytest.fixture
def planned(cli: Cli, tiny_teacher: Path, text_file: Path, tmp_path: Path) -> Any:
    def plan(*words: object) -> Any:
        given = ("--teacher", tiny_teacher, "--data", text_file, "--out", tmp_path / "cache")
        return cli("plan", *given, *SMALL, *GRID, *words)

    return plan


def test_the_chosen_command_makes_the_cache_that_was_planned(planned: Any, cli: Cli) -> None:
    every = planned("--json").json
    assert len(every["rows"]) == 2 * 2 * 2 + 2
    errors = sorted(row["error@2"] for row in every["rows"])
    middle = (errors[2] + errors[3]) / 2
    plan = planned("--target-error", middle, "--temperature", 2, "--json").json
    good = [row for row in plan["rows"] if row["error@2"] <= middle]
    assert plan["chosen"] == min(good, key=lambda row: row["bytes_per_token"])
    words = shlex.split(plan["command"])
    assert words[:2] == ["pmetal-pipeline", "cache"]
    made = cli(*words[1:], "--json")
    assert made.code == 0, made.err
    assert made.json["bytes_per_token"] == pytest.approx(plan["chosen"]["bytes_per_token"], rel=0.05)
    measured = cli("inspect", made.json["cache"], "--json").json["measured"]
    for temperature in (1, 2, 4):
        assert measured[f"gradient@{temperature}"] == pytest.approx(
            plan["chosen"][f"error@{temperature}"], rel=0.25
        )


def test_hidden_states_are_counted(planned: Any, cli: Cli, tmp_path: Path) -> None:
    words = ("--tail", "bucket", "--hidden-layers", "1,-1", "--hidden-rank", 8, "--target-error", 10)
    plan = planned(*words, "--json").json
    made = cli(*shlex.split(plan["command"])[1:], "--json").json
    assert made["hidden_bytes_per_token"] > 0
    assert plan["chosen"]["hidden_bytes_per_token"] == pytest.approx(made["hidden_bytes_per_token"], rel=0.05)


def test_what_cannot_be_reached_is_said(planned: Any) -> None:
    got = planned("--target-error", 1e-9)
    assert got.code == 1
    assert "at best" in got.err
    assert "top-16 bucket" in got.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target-error", 0), "greater than 0"),
        (("--target-error", 0.1, "--temperature", 0.5), "at least 1"),
        (("--sketch-rank", 2000), "at least sketch_rank"),
        (("--sketch-rank", 400), "the hidden size of this teacher"),
        (("--top-k", 4000), "at most"),
        (("--top-k", ""), "at least one value"),
        (("--tail", "fuzzy"), "not a list of sketch, bucket, none"),
    ],
)
def test_wrong_wishes(planned: Any, words: tuple[object, ...], message: str) -> None:
    got = planned(*words)
    assert got.code == 2
    assert message in got.err


def test_ranks_that_were_not_asked_for_are_those_that_the_teacher_allows(
    cli: Cli, tiny_teacher: Path, text_file: Path
) -> None:
    got = cli("plan", "--teacher", tiny_teacher, "--data", text_file, "--tail", "sketch", "--json")
    assert got.code == 0, got.err
    assert {row["rank"] for row in got.json["rows"]} == {32}


def test_the_command_repeats_what_was_given() -> None:
    settings = CacheSettings(
        teacher="t",
        data="my text",
        out=Path("o"),
        tail="bucket",
        hidden_layers=(1, -1),
        pack=False,
        zstd_level=3,
    )
    assert shlex.split(command_of(settings))[2:] == [
        *("--teacher", "t", "--data", "my text", "--out", "o", "--top-k", "16", "--tail", "bucket"),
        *("--hidden-layers", "1,-1", "--no-pack", "--zstd-level", "3"),
    ]


def test_a_grid_without_values() -> None:
    with pytest.raises(UsageError, match="ranks must have"):
        list(Grid(ranks=()).settings(CacheSettings(teacher="t", data="d", out=Path("o"))))

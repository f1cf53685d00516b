"""The reference is what the code generates, and the code describes everything that it must generate."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import pmetal_distill
from pipeline.cli import COMMANDS, main
from pipeline.settings import TrainSettings
from pmetal_distill.config import DistillConfig
from pmetal_distill.losses import TaidSchedule
from tests.tiny import build_tiny_model
from tools.reference import commands, facts, keys, names
from tools.reference.__main__ import DOCS, written
from tools.reference.raises import CLASSES
from tools.reference.sources import ROOT, Sources

REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.read()


def test_the_committed_pages_are_those_of_the_code() -> None:
    stale = [path.name for path, text in written().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python -m tools.reference"


def test_they_depend_on_nothing_else() -> None:
    surroundings = {
        "COLUMNS": "40",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "7",
        "PMETAL_KERNELS": "plain",
        "HOME": "/",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tools.reference", "--check"],
        cwd=ROOT,
        env={**os.environ, **surroundings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (0, "")


class TestCommands:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_has_a_help_text(self, name: str) -> None:
        found = list(commands.options(name))
        assert found
        assert [option.flags for option in found if len(option.help) < 10] == []

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_argument_is_spoken_of(self, name: str) -> None:
        text = commands.description(name).lower()
        arguments = [p for p in commands.command(name).params if isinstance(p, click.Argument)]
        for argument in arguments:
            shown = argument.make_metavar(click.Context(commands.command(name)))
            for word in re.findall(r"[a-zA-Z]+", shown):
                assert word.lower() in text

    def test_an_option_is_shown_with_type_and_default(self) -> None:
        shown = {option.flags[0]: option for option in commands.options("cache")}
        assert shown["--sketch-step"][2:4] == ("float", "60")
        assert shown["--teacher"].default == "required"
        assert shown["--tail"].kind == "[none|bucket|sketch]"
        assert (shown["--pack"].kind, shown["--pack"].default) == ("flag", "on")


class TestKeys:
    @pytest.mark.parametrize(
        "settings", [*keys.FILES.values(), *keys.NESTED.values(), DistillConfig, TaidSchedule]
    )
    def test_every_key_has_a_meaning(self, settings: type) -> None:
        assert [key.names for key in keys.keys(settings) if len(key.meaning) < 8] == []

    def test_every_setting_of_train_is_an_option_or_said_to_stand_in_files_only(self) -> None:
        options = {flag for option in commands.options("train") for flag in option.flags}
        for field in dataclasses.fields(TrainSettings):
            flag = "--" + field.name.replace("_", "-")
            assert flag in options or field.metadata["meaning"] in REFERENCE


class TestNames:
    def test_every_public_name_has_a_summary(self) -> None:
        found = {name.name: name for name in names.library()}
        assert list(found) == pmetal_distill.__all__
        for name in found.values():
            assert len(name.summary) > 15
            assert [member for member, summary in name.members if not summary] == []

    def test_every_public_name_of_the_contract_has_a_summary(self, sources: Sources) -> None:
        modules = list(names.contract(sources))
        assert len(modules) > 15
        for module in modules:
            assert len(module.summary) > 15
            assert [name for name, summary in module.members if not summary] == []


class TestFacts:
    def test_the_variables_are_those_that_the_code_reads(self, sources: Sources) -> None:
        assert facts.read_variables(sources) == set(facts.VARIABLES)

    def test_the_metrics_are_those_that_a_run_writes(self, tmp_path: Path) -> None:
        model, cache, out = build_tiny_model(tmp_path / "model"), tmp_path / "cache", tmp_path / "run"
        text = tmp_path / "text.txt"
        text.write_text("A teacher writes what it knows about every token. " * 60)
        cached = ["--hidden-layers", "1", "--max-seq-len", "32", "--tail", "bucket", "--quiet"]
        main(["cache", "--teacher", str(model), "--data", str(text), "--out", str(cache), *cached])
        trained = ["--hidden-loss", "mse", "--val-share", "0.3", "--iters", "2", "--quiet"]
        trained += ["--steps-per-eval", "2"]
        main(["train", "--student", str(model), "--cache", str(cache), "--out", str(out), *trained])
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert {name for line in lines for name in json.loads(line)} == set(facts.METRICS)

    def test_exit_codes_are_those_of_the_classes(self) -> None:
        assert {str(kind.exit_code) for kind in CLASSES.values()} <= set(facts.EXIT_CODES)

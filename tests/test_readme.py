"""What the README shows is run as it stands, with its paths pointed at a tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings
from pmetal_distill import Distiller
from pmetal_distill.offline.reader import LogitCache
from tests.pages import ROOT, blocks, run_python
from tests.tiny import build_tiny_model

README = (ROOT / "README.md").read_text()
BLOCKS = blocks("README.md", "python")


@pytest.fixture(scope="module")
def demo(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("demo")
    teacher = build_tiny_model(folder / "teacher", num_layers=25)
    data = folder / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog, and a teacher writes what it knows. " * 40)
    settings = CacheSettings(
        teacher=str(teacher),
        data=str(data),
        out=folder / "cache",
        max_seq_len=64,
        sketch_rank=8,
        batch_size=4,
    )
    run_cache(settings, Console(quiet=True))
    return {
        "runs/demo/cache": folder / "cache",
        "runs/demo/teacher": teacher,
        "runs/demo/student": tiny_student,
    }


def test_pyarrow_alone_decodes_a_position(demo: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in BLOCKS if "pyarrow" in block]
    names = run_python(block, demo, page="README.md")
    cache = LogitCache(demo["runs/demo/cache"])
    flat = [cache.sequence(number) for number in range(4)]
    targets = np.concatenate([row.targets.head_logprobs for row in flat])[100]
    ids = np.concatenate([row.targets.head_ids for row in flat])[100]
    np.testing.assert_array_equal(names["ids"], ids)
    np.testing.assert_allclose(names["probabilities"], np.exp(targets), rtol=1e-5)
    assert names["tail_mass"] == pytest.approx(1 - np.exp(targets).sum(), abs=1e-5)
    assert "after token" in capsys.readouterr().out


def test_the_examples_of_the_library_train(demo: dict[str, Path]) -> None:
    examples = [block for block in BLOCKS if "distiller.step(" in block]
    assert len(examples) == 3
    for block in examples:
        names = run_python(block, demo, page="README.md")
        loss = names["loss"] if "loss" in names else names["losses"][-1]  # type: ignore[index]
        assert np.isfinite(loss.total.item())
        assert names["distiller"].updates >= 1


def test_the_crates_losses_are_what_a_distiller_trains_on(demo: dict[str, Path]) -> None:
    (block,) = [block for block in BLOCKS if "JensenShannonLoss(" in block]
    names: dict[str, Any] = run_python(block, demo, page="README.md")
    stepped = Distiller(names["cache"], names["student"], names["config"]).step(names["batch"])
    assert names["loss"].item() == pytest.approx(stepped.total.item(), rel=1e-4)


def test_every_command_is_in_the_readme() -> None:
    from pipeline.cli import COMMANDS

    for command in COMMANDS:
        assert f"`{command}`" in README


def test_the_file_tree_names_files_that_exist() -> None:
    tree = README.split("## File tree")[1].split("```")[1]
    folder = ""
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            assert (ROOT / folder / name).exists(), line
        else:
            folder = name
            assert (ROOT / name).is_dir(), line

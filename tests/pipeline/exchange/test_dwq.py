"""DWQ targets written by mlx-lm's own function, with the text that the example script writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pmetal_distill.models import load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli, Outcome
from tests.pipeline.exchange.conftest import TEXTS, assert_same_targets, own_cache, truths_of

SIZES = {"batch_size": 2, "max_seq_length": 256, "seed": 7}


@pytest.fixture(scope="module")
def targets(wide_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `valid/` as `mlx_lm.dwq --targets-only` writes them, and tokens.jsonl of `train`."""
    from mlx_lm.quant.dwq import compute_dwq_targets

    from examples.dwq_tokens import sequences

    folder = tmp_path_factory.mktemp("dwq")
    data = [(truth.ids, 0) for truth in truths_of(wide_teacher, TEXTS)]
    compute_dwq_targets(load_model(wide_teacher).model, folder, data, data[:2], **SIZES)
    lines = [json.dumps({"token_ids": ids}) for ids in sequences(data, **SIZES)]
    (folder / "tokens.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(cli: Cli, wide_teacher: Path, tmp_path: Path) -> Any:
    def go(source: Path, *words: object) -> Outcome:
        return cli(
            *("import", "dwq", source, "--out", tmp_path / "c", "--tokenizer", wide_teacher),
            *("--teacher-name", "wide", "--json", *words),
        )

    return go


def test_the_targets_are_those_of_our_own_cache(
    run: Any, targets: Path, wide_teacher: Path, tmp_path: Path
) -> None:
    got = run(targets / "train", "--tokens", targets / "tokens.jsonl", "--top-k", 64)
    assert got.code == 0, got.err
    assert (got.json["tail"], got.json["top_k"]) == ("none", 64)
    assert "1024 listed tokens" in got.json["lost"]
    own = own_cache(wide_teacher, TEXTS, tmp_path, top_k=64, tail="none")
    assert_same_targets(tmp_path / "c", own, k=64, relative=True)


def test_all_that_is_listed_is_kept_by_default(run: Any, targets: Path, tmp_path: Path) -> None:
    assert run(targets / "train", "--tokens", targets / "tokens.jsonl").json["top_k"] == 1024
    row = LogitCache(tmp_path / "c").sequence(0)
    total = np.exp(row.targets.head_logprobs[row.loss_mask].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(total, 1, atol=0.01)


class TestRefusals:
    def test_the_text_must_be_given(self, run: Any, targets: Path) -> None:
        got = run(targets / "train")
        assert got.code == 2
        assert "examples/dwq_tokens.py" in got.err

    def test_one_split_at_a_time(self, run: Any, targets: Path) -> None:
        got = run(targets, "--tokens", targets / "tokens.jsonl")
        assert got.code == 1
        assert "train" in got.err

    @pytest.mark.parametrize("change", ["short", "long", "other"])
    def test_the_text_must_fit(self, run: Any, targets: Path, tmp_path: Path, change: str) -> None:
        lines = (targets / "tokens.jsonl").read_text().splitlines()
        lines = {
            "short": lines[:-1],
            "long": [*lines, lines[0]],
            "other": ["[" + "1," * 300 + "1]", *lines[1:]],
        }[change]
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        got = run(targets / "train", "--tokens", tmp_path / "t.jsonl")
        assert got.code == 1
        assert "t.jsonl" in got.err

    def test_the_total_is_not_known(self, run: Any, targets: Path) -> None:
        got = run(targets / "train", "--tokens", targets / "tokens.jsonl", "--tail", "bucket")
        assert got.code == 2
        assert "tail: must be 'none'" in got.err

    def test_options_of_other_formats(self, run: Any, targets: Path) -> None:
        got = run(targets / "train", "--compression-config", targets / "tokens.jsonl")
        assert got.code == 2
        assert "belongs to distillkit" in got.err

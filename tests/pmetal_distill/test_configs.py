"""Configurations that say what no model has: an error that names the key, before anything is built."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from pmetal_distill.modelling.configs import check_config
from pmetal_distill.models import load_model
from schemas.errors import ModelError
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be from 1 to 4,096, found 1000000000"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' must be from 1"),
        ({"vocab_size": 1 << 40}, "'vocab_size' must be from 1 to 16,777,216"),
        ({"vocab_size": 0}, "'vocab_size' must be from 1"),
        ({"num_attention_heads": 0}, "'num_attention_heads' must be from 1"),
        ({"num_key_value_heads": -1}, "'num_key_value_heads' must be from 0"),
        ({"hidden_size": float("nan")}, "'hidden_size' must be from 1"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "'num_hidden_layers' must be from 0"),
    ],
)
def test_sizes_that_no_model_has(
    tiny_teacher: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    started = time.process_time()
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        load_model(folder)
    assert named in str(caught.value)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("brackets", ["[]", '{"a": }'])
def test_depth(tiny_teacher: Path, tmp_path: Path, brackets: str) -> None:
    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "m"))
    start, end = (brackets[:-1], brackets[-1])
    for levels, found in ((100_000, "not JSON"), (300, "at most 32 levels")):
        text = f'{{"model_type": "llama", "x": {start * levels}1{end * levels}}}'
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=found):
            load_model(folder)


def test_what_models_have_is_taken() -> None:
    sizes = {
        "num_key_value_heads": [1, 2],
        "intermediate_size": 0,
        "num_experts": None,
        "vocab_size": 300_000,
    }
    check_config(
        sizes | {"text_config": {"num_hidden_layers": 80}, "rope": {"factor": [1.0, 2.0]}}, where="x"
    )
    check_config(tiny_config(), where="x")

"""Students of architectures whose layers differ: the pattern stays, every list goes along, and they run."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.modelling.stand_ins import path_to_blocks, replaced
from pmetal_distill.models import LoadedModel, load_model, wrap_model
from pmetal_distill.students import fitting_layers, init_student, prune_layers
from schemas.errors import ModelError
from tests.tiny import random_model
from tests.zoo import array, some_tokens
from tests.zoo.configs import small_config

IDS = some_tokens(2, 9)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return load_model(tiny_teacher).tokenizer


def teacher_of(name: str, tokenizer: Any, **changes: Any) -> LoadedModel:
    config = small_config(name) | changes
    return wrap_model(random_model(config), tokenizer, config)


def cut(teacher: LoadedModel, layers: list[int]) -> np.ndarray:
    """The teacher's own call with only these of its blocks."""
    path = path_to_blocks(teacher.model)
    assert path is not None
    blocks = [teacher.model.layers[index] for index in layers]
    return array(replaced(teacher.model, path, blocks)(IDS))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("phi3", [0, 3]),
        ("minicpm", [0, 3]),  # the share that a block adds depends on how many there are
        ("minicpm3", [1, 2, 3]),
        ("openelm", [0, 2]),
        ("lfm2", [0, 1]),
        ("nemotron_h", [0, 1, 3]),
    ],
)
def test_the_student_is_the_teacher_with_those_layers(
    name: str, layers: list[int], tokenizer: Any, tmp_path: Path
) -> None:
    teacher = teacher_of(name, tokenizer)
    student = load_model(init_student(teacher, keep_layers=layers, out=tmp_path / "student"))
    assert student.num_layers == len(layers)
    np.testing.assert_allclose(array(student.full(IDS)), cut(teacher, layers), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("smollm3", "no_rope_layers", [1, 0]),  # worked out by mlx-lm, not in config.json
        ("muse_glimmer", "layer_types", ["sliding_attention", "full_attention"]),
        ("nemotron_h", "hybrid_override_pattern", "ME"),
        ("baichuan_m1", "sliding_window_layers", [0]),
        ("deepseek_v3", "first_k_dense_replace", 1),
        ("openelm", "num_query_heads", [4, 8]),
        ("iquestloopcoder", "num_hidden_layers", 2),
    ],
)
def test_what_the_configuration_says_of_layers_goes_along(
    name: str, key: str, expected: Any, tokenizer: Any
) -> None:
    assert prune_layers(teacher_of(name, tokenizer), [0, 3]).config[key] == expected


def test_numbers_of_layers_that_count_from_one(tokenizer: Any) -> None:
    config = prune_layers(teacher_of("kimi_linear", tokenizer), [1, 2]).config["linear_attn_config"]
    assert (config["kda_layers"], config["full_attn_layers"]) == ([2], [1])
    assert config["num_heads"] == 2


def test_tables_with_a_part_for_each_layer(tokenizer: Any) -> None:
    teacher = teacher_of("gemma4_text", tokenizer)
    weights = prune_layers(teacher, [0, 2]).weights
    whole = teacher.model.model.embed_tokens_per_layer.weight.reshape(-1, 4, 8)
    kept = weights["model.embed_tokens_per_layer.weight"].reshape(-1, 2, 8)
    assert mx.array_equal(kept, whole[:, mx.array([0, 2])])
    rows = teacher.model.model.per_layer_model_projection.weight.reshape(4, 8, -1)
    assert mx.array_equal(
        weights["model.per_layer_model_projection.weight"].reshape(2, 8, -1), rows[mx.array([0, 2])]
    )


@pytest.mark.parametrize(
    ("name", "count", "changes"),
    [
        ("qwen3_next", 4, {"num_hidden_layers": 8, "full_attention_interval": 4}),
        ("llama4_text", 2, {"no_rope_layers": [1, 1, 1, 0]}),
        ("gemma3_text", 5, {"num_hidden_layers": 8, "sliding_window_pattern": 4}),
        ("gemma3n", 2, {}),
        ("afm7", 2, {}),
    ],
)
def test_layers_that_keep_the_pattern(
    name: str, count: int, changes: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    teacher = teacher_of(name, tokenizer, **changes)
    layers = fitting_layers(teacher, count)
    assert len(layers) == count
    student = load_model(init_student(teacher, num_layers=count, out=tmp_path / "student"))
    assert [type(layer) for layer in student.model.layers] == [
        type(teacher.model.layers[index]) for index in layers
    ]
    assert bool(mx.isfinite(student.full(IDS)).all())


def test_the_nearest_that_fit_are_taken(tokenizer: Any) -> None:
    """Every fourth layer is full attention: 0, 2, 4, 5, 7 has it in the wrong place."""
    config = {"num_hidden_layers": 8, "full_attention_interval": 4}
    assert fitting_layers(teacher_of("qwen3_next", tokenizer, **config), 5) == [0, 1, 2, 3, 6]


def test_a_student_that_does_not_run(tokenizer: Any, tmp_path: Path) -> None:
    teacher = teacher_of("recurrent_gemma", tokenizer, block_types=["recurrent", "recurrent", "attention"])
    with pytest.raises(ModelError, match="a student must run, found that it fails on a few tokens"):
        init_student(teacher, keep_layers=[0, 1], out=tmp_path / "student")
    assert list(tmp_path.iterdir()) == []

"""Students: which layers are kept, that they are the teacher's, and what must be refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from pmetal_distill.models import (
    LoadedModel,
    chat_template_fingerprint,
    compare_tokenizers,
    load_model,
    save_model,
    wrap_model,
)
from pmetal_distill.students import evenly_spaced, fresh_student, init_student, prune_layers, shared_rows
from schemas.errors import ModelError, UsageError
from tests.tiny import random_model, tiny_config

GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 8,
}


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> LoadedModel:
    """The tiny teacher, 4 layers."""
    return load_model(tiny_teacher)


def some_tokens() -> mx.array:
    return mx.array(np.random.default_rng(0).integers(0, 320, (2, 9)).astype(np.int32))


def weights_of(loaded: LoadedModel) -> dict[str, Any]:
    return dict(tree_flatten(loaded.model.parameters()))


def with_layers(loaded: LoadedModel, layers: list[int]) -> np.ndarray:
    """The teacher's logits when only `layers` run, block by block."""
    body: Any = loaded.model.model
    ids = some_tokens()
    states = body.embed_tokens(ids)
    for index in layers:
        states = body.layers[index](states, "causal", None)
    return np.array(loaded.logits(body.norm(states)))


class TestEvenlySpaced:
    @pytest.mark.parametrize(
        ("num_layers", "count", "expected"),
        [
            (30, 10, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
            (4, 2, [0, 3]),
            (5, 3, [0, 2, 4]),
            (4, 4, [0, 1, 2, 3]),
            (7, 1, [0]),
            (1, 1, [0]),
        ],
    )
    def test_examples(self, num_layers: int, count: int, expected: list[int]) -> None:
        assert evenly_spaced(num_layers, count) == expected

    @settings(derandomize=True)
    @given(st.integers(2, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(2, n))))
    def test_ends_are_kept_and_gaps_differ_by_one(self, sizes: tuple[int, int]) -> None:
        layers = evenly_spaced(*sizes)
        assert (len(layers), layers[0], layers[-1]) == (sizes[1], 0, sizes[0] - 1)
        gaps = {b - a for a, b in pairwise(layers)}
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1

    @pytest.mark.parametrize("count", [0, -1, 5])
    def test_bad_counts(self, count: int) -> None:
        with pytest.raises(UsageError, match=f"from 1 to 4, the teacher's, found {count}"):
            evenly_spaced(4, count)


class TestInitStudent:
    @pytest.mark.parametrize("layers", [[0, 3], [1], [0, 1, 2, 3]])
    def test_it_is_the_teacher_with_those_layers(
        self, teacher: LoadedModel, layers: list[int], tmp_path: Path
    ) -> None:
        student = load_model(init_student(teacher, keep_layers=layers, out=tmp_path / "student"))
        assert student.num_layers == len(layers)
        assert student.config["num_hidden_layers"] == len(layers)
        np.testing.assert_allclose(
            np.array(student.full(some_tokens())), with_layers(teacher, layers), atol=1e-5
        )

    def test_evenly_spaced_by_number(self, teacher: LoadedModel, tmp_path: Path) -> None:
        student = load_model(init_student(teacher, num_layers=2, out=tmp_path / "student"))
        np.testing.assert_allclose(
            np.array(student.full(some_tokens())), with_layers(teacher, [0, 3]), atol=1e-5
        )

    def test_negative_numbers_count_from_the_end(self, teacher: LoadedModel) -> None:
        assert prune_layers(teacher, [0, -1]).weights.keys() == prune_layers(teacher, [0, 3]).weights.keys()
        last = prune_layers(teacher, [-1]).weights["model.layers.0.mlp.up_proj.weight"]
        assert last is weights_of(teacher)["model.layers.3.mlp.up_proj.weight"]

    def test_the_tokenizer_is_the_teachers(self, teacher: LoadedModel, tmp_path: Path) -> None:
        student = load_model(init_student(teacher, num_layers=2, out=tmp_path / "student"))
        assert compare_tokenizers(student.tokenizer, teacher.tokenizer) == []
        assert chat_template_fingerprint(student.tokenizer) == chat_template_fingerprint(teacher.tokenizer)

    def test_the_teacher_is_left_alone(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config, weights = json.dumps(teacher.config), weights_of(teacher)
        init_student(teacher, num_layers=2, out=tmp_path / "student")
        assert json.dumps(teacher.config) == config
        assert all(weights_of(teacher)[name] is tensor for name, tensor in weights.items())

    def test_per_layer_settings_move_along(self, teacher: LoadedModel, tmp_path: Path) -> None:
        types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        config = tiny_config(sliding_window=4, layer_types=types, eos_token_id=[2, 1, 0, 3])
        mixed = wrap_model(random_model(config), teacher.tokenizer, config)
        student = load_model(init_student(mixed, keep_layers=[0, 2, 3], out=tmp_path / "student"))
        assert student.config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
        assert student.config["eos_token_id"] == [2, 1, 0, 3]
        blocks: Any = student.model.layers
        assert [block.use_sliding for block in blocks] == [True, True, False]

    def test_a_layer_that_would_change_its_kind(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config = tiny_config(**GEMMA)
        alternating = wrap_model(random_model(config), teacher.tokenizer, config)
        with pytest.raises(ModelError, match="layer 2 would be another kind of layer at position 1"):
            init_student(alternating, keep_layers=[0, 2], out=tmp_path / "student")
        assert list(tmp_path.iterdir()) == []
        student = load_model(init_student(alternating, keep_layers=[0, 3], out=tmp_path / "student"))
        assert student.num_layers == 2

    def test_nested_configurations(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config = {"model_type": "mistral3", "text_config": tiny_config()}
        wrapped = wrap_model(random_model(config), teacher.tokenizer, config)
        student = load_model(init_student(wrapped, num_layers=3, out=tmp_path / "student"))
        assert student.num_layers == student.config["text_config"]["num_hidden_layers"] == 3

    def test_quantized_teachers(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config = tiny_config()
        model = random_model(config)
        own = {"group_size": 32, "bits": 8}

        def bits(path: str, module: nn.Module) -> bool | dict[str, int]:
            return own if path == "model.layers.3.mlp.up_proj" else hasattr(module, "to_quantized")

        nn.quantize(model, group_size=32, bits=4, class_predicate=bits)
        config["quantization"] = {"group_size": 32, "bits": 4, "model.layers.3.mlp.up_proj": own}
        saved = save_model(model, tmp_path / "teacher", tokenizer=teacher.tokenizer, config=config)
        student = load_model(init_student(load_model(saved), keep_layers=[1, 3], out=tmp_path / "student"))
        assert student.config["quantization"]["model.layers.1.mlp.up_proj"] == own
        blocks: Any = student.model.layers
        assert [block.mlp.up_proj.bits for block in blocks] == [4, 8]

    @pytest.mark.parametrize(
        ("layers", "found"),
        [
            ([], "found none"),
            ([4], "found 4"),
            ([-5], "found -5"),
            ([1, 1], "found 1 after 1"),
            ([0, -4], "found 0 after 0"),
            ([2, 1], "found 1 after 2"),
        ],
    )
    def test_bad_layers(self, teacher: LoadedModel, layers: list[int], found: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=f"from 0 to 3, ascending, each once; {found}"):
            init_student(teacher, keep_layers=layers, out=tmp_path / "student")
        assert list(tmp_path.iterdir()) == []

    def test_one_of_two_options(self, teacher: LoadedModel, tmp_path: Path) -> None:
        for options in ({}, {"keep_layers": [0], "num_layers": 1}):
            with pytest.raises(UsageError, match="one of the two"):
                init_student(teacher, out=tmp_path / "student", **options)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="found 0"):
            init_student(teacher, num_layers=0, out=tmp_path / "student")

    def test_a_folder_in_use(self, teacher: LoadedModel, tiny_teacher: Path) -> None:
        with pytest.raises(UsageError, match="must not exist yet"):
            init_student(teacher, num_layers=2, out=tiny_teacher)


class TestFreshStudent:
    def test_it_loads_with_the_teachers_tokenizer(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config = tiny_config(model_type="qwen3", num_layers=3, vocab_size=384)
        student = load_model(fresh_student(config, teacher.tokenizer, tmp_path / "student", seed=0))
        assert (student.num_layers, student.vocab_size) == (3, 384)
        assert compare_tokenizers(student.tokenizer, teacher.tokenizer) == []

    def test_the_seed_decides_and_the_global_state_stays(self, teacher: LoadedModel, tmp_path: Path) -> None:
        mx.random.seed(7)
        expected = mx.random.normal((3,)).tolist()
        mx.random.seed(7)
        paths = [
            fresh_student(tiny_config(), teacher.tokenizer, tmp_path / name, seed)
            for name, seed in (("a", 0), ("b", 0), ("c", 1))
        ]
        assert mx.random.normal((3,)).tolist() == expected
        a, b, c = ((path / "model.safetensors").read_bytes() for path in paths)
        assert a == b != c

    @pytest.mark.parametrize("own_tie", [True, False])
    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize(("own_size", "size"), [(320, 384), (384, 320)])
    def test_embeddings_of_the_teacher(
        self, teacher: LoadedModel, tie: bool, own_tie: bool, size: int, own_size: int, tmp_path: Path
    ) -> None:
        config = tiny_config(vocab_size=size, tie=tie)
        giver = wrap_model(random_model(config), teacher.tokenizer, config)
        own = tiny_config(vocab_size=own_size, tie=own_tie, num_layers=1)
        plain, given = (
            weights_of(load_model(fresh_student(own, teacher.tokenizer, tmp_path / name, 0, teacher=t)))
            for name, t in (("plain", None), ("given", giver))
        )
        source = weights_of(giver)
        embedding = "model.embed_tokens.weight"
        expected = {embedding: embedding}
        if not own_tie:
            expected["lm_head.weight"] = embedding if tie else "lm_head.weight"
        assert shared_rows(own, giver) == 320
        for name, value in given.items():
            begun = np.array(plain[name])
            if name in expected:
                begun[:320] = np.array(source[expected[name]])[:320]
            np.testing.assert_array_equal(np.array(value), begun, err_msg=name)

    def test_embeddings_of_another_width_are_not_shared(self, teacher: LoadedModel, tmp_path: Path) -> None:
        config = tiny_config(hidden_size=40, num_layers=1)
        assert shared_rows(config, teacher) == 0
        paths = [
            fresh_student(config, teacher.tokenizer, tmp_path / name, 0, teacher=giver)
            for name, giver in (("a", None), ("b", teacher))
        ]
        a, b = ((path / "model.safetensors").read_bytes() for path in paths)
        assert a == b

    @pytest.mark.parametrize(("size", "found"), [(319, "found 319"), (None, "found None")])
    def test_a_vocabulary_too_small(
        self, teacher: LoadedModel, size: int | None, found: str, tmp_path: Path
    ) -> None:
        config = tiny_config() | {"vocab_size": size}
        with pytest.raises(UsageError, match=f"at least 320, the tokenizer's size, {found}"):
            fresh_student(config, teacher.tokenizer, tmp_path / "student", seed=0)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("change", [{"model_type": "hal9000"}, {"num_attention_heads": "four"}])
    def test_a_configuration_mlx_lm_does_not_know(
        self, teacher: LoadedModel, change: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(ModelError, match="cannot build this model"):
            fresh_student(tiny_config() | change, teacher.tokenizer, tmp_path / "student", seed=0)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_teacher_with_ten_layers(real_teacher: Path, tmp_path: Path) -> None:
    teacher = load_model(real_teacher)
    student = load_model(init_student(teacher, num_layers=10, out=tmp_path / "student"))
    ids = mx.array(
        [teacher.tokenizer.encode("A list comprehension consists of brackets containing an expression.")]
    )
    assert (student.num_layers, student.hidden_size, student.vocab_size) == (10, 576, 49152)
    assert np.isfinite(np.array(student.full(ids))).all()

"""Students whose layers and neurons were measured: scores against slow computations, cut models."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from pmetal_distill.models import LoadedModel, load_model, wrap_model
from pmetal_distill.students import (
    block_influence,
    influential_layers,
    init_student,
    largest,
    mlp_width,
    neuron_importance,
    prune_mlp,
)
from pmetal_distill.teaching import TextBatch
from schemas.errors import ModelError, UsageError
from tests.tiny import random_model, tiny_config

# Three documents and padding in two sequences.
DOCUMENTS = np.array([[0] * 5 + [1] * 7, [2] * 9 + [-1] * 3], np.int32)
SPANS = [(0, 0, 5), (0, 5, 12), (1, 0, 9)]


@pytest.fixture
def sample() -> list[TextBatch]:
    """The same text twice: in one batch, and a row at a time with other ids."""
    rng = np.random.default_rng(0)
    batches = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        documents = DOCUMENTS[rows]
        ids = rng.integers(0, 320, documents.shape).astype(np.int32)
        batches.append(TextBatch(ids, documents, documents >= 0, ids))
    return batches


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> LoadedModel:
    return load_model(tiny_teacher)


def documents_of(sample: list[TextBatch]) -> list[np.ndarray]:
    """Each document alone."""
    return [
        batch.token_ids[row, batch.documents[row] == number]
        for batch in sample
        for row in range(len(batch.token_ids))
        for number in np.unique(batch.documents[row])
        if number >= 0
    ]


def walk(model: Any, ids: np.ndarray, layers: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and outputs [L, d] of the blocks, run one by one on one document."""
    states = model.model.embed_tokens(mx.array(ids[None]))
    pairs = []
    for index in layers:
        before = states
        states = model.model.layers[index](states, "causal", None)
        pairs.append((np.array(before[0], np.float64), np.array(states[0], np.float64)))
    return pairs


def slow_influence(model: Any, sample: list[TextBatch], layers: list[int]) -> np.ndarray:
    scores: list[list[float]] = [[] for _ in layers]
    for ids in documents_of(sample):
        for own, (before, after) in zip(scores, walk(model, ids, layers), strict=True):
            for a, b in zip(before, after, strict=True):
                own.append(1 - float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)))
    return np.array([np.mean(own) for own in scores])


class TestLayers:
    @pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2], [3]])
    def test_influence_is_that_of_a_slow_walk(
        self, teacher: LoadedModel, sample: list[TextBatch], layers: list[int]
    ) -> None:
        found = block_influence(teacher, sample, layers=layers)
        np.testing.assert_allclose(found, slow_influence(teacher.model, sample, layers), atol=1e-5)

    def test_all_layers_unless_told_otherwise(self, teacher: LoadedModel, sample: list[TextBatch]) -> None:
        expected = block_influence(teacher, sample, layers=range(4))
        np.testing.assert_array_equal(block_influence(teacher, sample), expected)

    def test_the_least_influential_goes_first_and_the_rest_is_measured_again(
        self, sample: list[TextBatch]
    ) -> None:
        config = tiny_config(num_layers=6)
        model = random_model(config, seed=3)
        for index, size in enumerate((1.0, 0.05, 0.3, 0.3, 0.02, 1.0)):
            block = model.model.layers[index]
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight = projection.weight * size
        loaded = wrap_model(model, None, config)
        left: list[int] = []
        assert influential_layers(loaded, 3, sample, told=left.append) == sorted(set(range(6)) - set(left))
        assert left[:2] == [4, 1]
        third = [0, 2, 3, 5]
        assert left[2] == third[int(np.argmin(slow_influence(model, sample, third)))]

    def test_the_teacher_is_left_alone(self, teacher: LoadedModel, sample: list[TextBatch]) -> None:
        before = np.array(teacher.full(mx.array(sample[0].token_ids)))
        influential_layers(teacher, 2, sample)
        neuron_importance(teacher, sample)
        np.testing.assert_array_equal(np.array(teacher.full(mx.array(sample[0].token_ids))), before)

    @pytest.mark.parametrize("count", [0, 5])
    def test_bad_counts(self, teacher: LoadedModel, sample: list[TextBatch], count: int) -> None:
        with pytest.raises(UsageError, match=f"from 1 to 4, the teacher's, found {count}"):
            influential_layers(teacher, count, sample)

    def test_recurrent_layers_take_text_without_documents(self, sample: list[TextBatch]) -> None:
        config = tiny_config(
            model_type="mamba",
            state_size=8, conv_kernel=4, use_bias=True, use_conv_bias=True, time_step_rank=4,
        )  # fmt: skip
        loaded = wrap_model(random_model(config), None, config)
        assert len(influential_layers(loaded, 3, sample)) == 3


class TestNeurons:
    def test_importance_is_that_of_a_slow_walk(self, teacher: LoadedModel, sample: list[TextBatch]) -> None:
        model: Any = teacher.model
        squares = [np.zeros(64) for _ in range(4)]
        tokens = 0
        for ids in documents_of(sample):
            tokens += len(ids)
            for index, (before, _) in enumerate(walk(model, ids, [0, 1, 2, 3])):
                block = model.model.layers[index]
                attended = mx.array(before[None].astype(np.float32))
                attended = attended + block.self_attn(block.input_layernorm(attended), "causal", None)
                x = np.array(block.post_attention_layernorm(attended)[0], np.float64)
                gate, up = (
                    x @ np.array(w.weight, np.float64).T for w in (block.mlp.gate_proj, block.mlp.up_proj)
                )
                squares[index] += np.square(gate / (1 + np.exp(-gate)) * up).sum(axis=0)
        found = neuron_importance(teacher, sample)
        for index, total in enumerate(squares):
            down = np.array(model.model.layers[index].mlp.down_proj.weight, np.float64)
            expected = [np.sqrt(total[j] / tokens) * np.linalg.norm(down[:, j]) for j in range(64)]
            np.testing.assert_allclose(found[index], expected, rtol=1e-4, atol=1e-5)

    def test_the_largest(self) -> None:
        scores = [np.array([3.0, 1.0, 2.0, 2.0]), np.array([0.0, 0.0, 0.0, 1.0])]
        assert [kept.tolist() for kept in largest(scores, 2)] == [[0, 2], [0, 3]]
        for width in (0, 5):
            with pytest.raises(
                UsageError, match=f"mlp_width: must be from 1 to 4, the teacher's, found {width}"
            ):
                largest(scores, width)


class TestWidth:
    def test_a_narrow_student_is_the_teacher_with_the_other_neurons_off(
        self, teacher: LoadedModel, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(0)
        neurons = [np.sort(rng.choice(64, 24, replace=False)) for _ in range(4)]
        student = load_model(init_student(teacher, neurons=neurons, out=tmp_path / "student"))
        assert student.config["intermediate_size"] == mlp_width(student) == 24
        assert student.num_layers == 4
        silenced = load_model(str(teacher.folder))
        blocks: Any = silenced.model.layers
        for block, kept in zip(blocks, neurons, strict=True):
            on = np.zeros(64, np.float32)
            on[kept] = 1
            block.mlp.down_proj.weight = block.mlp.down_proj.weight * mx.array(on)
        ids = mx.array([[5, 99, 3, 250, 17]])
        np.testing.assert_allclose(np.array(student.full(ids)), np.array(silenced.full(ids)), atol=1e-4)

    def test_layers_and_neurons_together(self, teacher: LoadedModel, tmp_path: Path) -> None:
        neurons = [np.arange(index, index + 8) for index in range(4)]
        student = load_model(
            init_student(teacher, keep_layers=[0, 3], neurons=neurons, out=tmp_path / "student")
        )
        model, source = student.model, teacher.model
        assert (student.num_layers, mlp_width(student)) == (2, 8)
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            found = np.array(model.layers[1].mlp[name].weight)
            whole = np.array(source.layers[3].mlp[name].weight)
            np.testing.assert_array_equal(found, np.take(whole, np.arange(3, 11), axis=axis))

    def test_biases_of_neurons_move_along(self) -> None:
        config = tiny_config(mlp_bias=True)
        model = random_model(config)
        loaded = wrap_model(model, None, config)
        neurons = [np.array([3, 10, 60])] * 4
        pruned = prune_mlp(loaded, neurons)
        name = "model.layers.2.mlp.{}.bias"
        up, down = (np.array(model.model.layers[2].mlp[n].bias) for n in ("up_proj", "down_proj"))
        np.testing.assert_array_equal(np.array(pruned.weights[name.format("up_proj")]), up[neurons[2]])
        np.testing.assert_array_equal(np.array(pruned.weights[name.format("down_proj")]), down)
        assert loaded.config["intermediate_size"] == 64

    @pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "mistral3"])
    def test_other_architectures(self, model_type: str, teacher: LoadedModel, tmp_path: Path) -> None:
        config: dict[str, Any] = {"model_type": model_type, "text_config": tiny_config()}
        if model_type != "mistral3":
            config = tiny_config(model_type=model_type)
        loaded = wrap_model(random_model(config), teacher.tokenizer, config)
        student = load_model(init_student(loaded, neurons=[np.arange(16)] * 4, out=tmp_path / "student"))
        assert mlp_width(student) == 16

    def test_what_cannot_be_cut(self, teacher: LoadedModel) -> None:
        config = tiny_config()
        quantized = random_model(config)
        nn.quantize(quantized, group_size=32, bits=4)
        with pytest.raises(ModelError, match="not quantized; found 1 in layer 0, QuantizedLinear"):
            mlp_width(wrap_model(quantized, None, config))
        config = tiny_config(
            model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
        with pytest.raises(ModelError, match="leave the width as it is"):
            mlp_width(wrap_model(random_model(config), None, config))
        other = wrap_model(teacher.model, None, teacher.config | {"intermediate_size": 63})
        with pytest.raises(
            ModelError, match=r"as config.json says in intermediate_size, found widths \[64\]"
        ):
            mlp_width(other)

    @pytest.mark.parametrize(
        ("neurons", "message"),
        [
            ([[0, 1]] * 3, r"as many in each of 4 layers"),
            ([[0, 1]] * 3 + [[0]], r"found \[1, 2\]"),
            ([[0, 64]] * 4, "neurons of layer 0 must be from 0 to 63, ascending"),
            ([[1, 0]] * 4, "ascending"),
            ([[2, 2]] * 4, "ascending"),
            ([[]] * 4, "neurons of layer 0"),
        ],
    )
    def test_bad_neurons(self, teacher: LoadedModel, neurons: list[list[int]], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            prune_mlp(teacher, [np.array(kept, np.int64) for kept in neurons])


@pytest.mark.slow
def test_measured_layers_of_the_real_teacher_beat_evenly_spaced_ones(
    real_teacher: Path, tmp_path: Path
) -> None:
    from pydoc_data.topics import topics

    teacher = load_model(real_teacher)
    ids = np.array(teacher.tokenizer.encode("\n".join(topics.values())[:8000])[:384], np.int32)
    measured, judged = ids.reshape(4, 96)[:2], mx.array(ids.reshape(4, 96)[2:])
    batch = TextBatch(measured, np.zeros_like(measured), measured >= 0, measured)
    layers = influential_layers(teacher, 15, [batch])
    p = mx.softmax(teacher.full(judged), axis=-1)

    def kl(name: str, **chosen: Any) -> float:
        student = load_model(init_student(teacher, out=tmp_path / name, **chosen))
        q = student.full(judged)
        terms = p * (mx.log(mx.maximum(p, 1e-30)) - q + mx.logsumexp(q, axis=-1, keepdims=True))
        return float(terms.sum(axis=-1).mean())

    assert kl("measured", keep_layers=layers) < 0.7 * kl("evenly", num_layers=15)

"""Adapters: what is trained, that it learns, that mlx-lm reads it, and merging."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from pmetal_distill.adapters import (
    AdapterSpec,
    adapter_weights,
    add_adapters,
    load_adapted,
    load_adapter_weights,
    merged_weights,
    require_dense,
    save_adapters,
    train_last_blocks,
)
from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import LoadedModel, load_model, wrap_model
from pmetal_distill.teaching import TextBatch
from schemas.errors import ModelError, UsageError
from tests.pmetal_distill.adapter_cases import LINEARS, in_memory, some_text, stir
from tests.tiny import build_tiny_model, random_model
from tests.zoo import separately
from tests.zoo.configs import small_config

KINDS = ("lora", "dora")


@pytest.fixture
def teacher(tiny_teacher: Path) -> LoadedModel:
    return load_model(tiny_teacher)


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def logits_of(loaded: LoadedModel, text: TextBatch) -> np.ndarray:
    return np.array(loaded.full(mx.array(text.token_ids), documents=text.documents))


class TestAdding:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [None, 8])
    def test_new_adapters_change_nothing(self, kind: Any, bits: int | None) -> None:
        student, text = in_memory(bits=bits), some_text()
        before = logits_of(student, text)
        adapted = add_adapters(student, AdapterSpec(kind), seed=0)
        np.testing.assert_allclose(logits_of(adapted, text), before, atol=2e-5)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("num_layers", "blocks"), [(-1, [0, 1, 2]), (2, [1, 2])])
    def test_only_adapters_are_trained(self, kind: Any, num_layers: int, blocks: list[int]) -> None:
        adapted = add_adapters(in_memory(), AdapterSpec(kind, rank=3, num_layers=num_layers), seed=0)
        leaves = ("lora_a", "lora_b") + (("m",) if kind == "dora" else ())
        expected = {f"model.layers.{b}.{k}.{leaf}" for b in blocks for k in LINEARS for leaf in leaves}
        assert adapter_weights(adapted.model).keys() == expected

    def test_keys_choose_layers(self) -> None:
        spec = AdapterSpec(keys=("self_attn.q_proj", "mlp.down_proj"), num_layers=1)
        names = adapter_weights(add_adapters(in_memory(), spec, seed=0).model)
        assert {name.rsplit(".", 1)[0] for name in names} == {
            "model.layers.2.self_attn.q_proj",
            "model.layers.2.mlp.down_proj",
        }

    def test_the_weights_are_those_of_mlx_lm_with_this_seed(self) -> None:
        from mlx_lm.tuner.utils import linear_to_lora_layers

        reference = in_memory().model
        reference.freeze()
        mx.random.seed(7)
        linear_to_lora_layers(reference, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
        mx.random.seed(3)
        expected = mx.random.normal((2,)).tolist()
        student = in_memory()
        mx.random.seed(3)
        found = add_adapters(student, AdapterSpec(rank=4, scale=10.0, num_layers=2), seed=7)
        assert mx.random.normal((2,)).tolist() == expected
        for name, value in adapter_weights(reference).items():
            np.testing.assert_array_equal(np.array(value), np.array(adapter_weights(found.model)[name]))

    @pytest.mark.parametrize("kind", KINDS)
    def test_body_head_and_documents_still_work(self, kind: Any) -> None:
        adapted = add_adapters(in_memory(), AdapterSpec(kind), seed=0)
        stir(adapted.model)
        text = some_text()
        ids = mx.array(text.token_ids)
        states = adapted.hidden(ids, documents=text.documents, layers=(0, 2))
        logits = np.array(adapted.logits(states.final))
        real = text.documents >= 0
        expected = separately(adapted.model, ids, text.documents)
        np.testing.assert_allclose(logits[real], expected[real], atol=2e-4)
        assert states.layers.keys() == {0, 2}
        again = wrap_model(adapted.model, None, adapted.config).anatomy
        assert (again.body, again.blocks, again.packing) == (
            adapted.anatomy.body,
            adapted.anatomy.blocks,
            adapted.anatomy.packing,
        )

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (AdapterSpec(keys=("self_attn.qproj",)), r"found 'self_attn.qproj'; .* has self_attn.q_proj"),
            (AdapterSpec(keys=("input_layernorm",)), "found 'input_layernorm'"),
            (AdapterSpec(keys=()), "must name a layer, found none"),
            (AdapterSpec(num_layers=4), "from 1 to 3, which a model in memory has, or -1 for all, found 4"),
            (AdapterSpec(num_layers=0), "found 0"),
            (AdapterSpec(keys=("model.embed_tokens",), dropout=0.1), "head's adapter must have dropout 0"),
        ],
    )
    def test_what_cannot_be_adapted(self, spec: AdapterSpec, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            add_adapters(in_memory(), spec, seed=0)

    def test_dora_of_packed_weights_that_mlx_lm_cannot_take(self) -> None:
        with pytest.raises(UsageError, match="found in a model in memory a QuantizedLinear of 6 bits"):
            add_adapters(in_memory(bits=6), AdapterSpec("dora"), seed=0)
        spec = AdapterSpec("dora", keys=("model.embed_tokens",))
        with pytest.raises(UsageError, match="a QuantizedEmbedding of 4 bits"):
            add_adapters(in_memory(bits=4), spec, seed=0)
        assert adapter_weights(add_adapters(in_memory(bits=6), AdapterSpec(), seed=0).model)

    def test_layers_whose_weights_the_model_reads_itself(self) -> None:
        """As mlx_lm's Gemma 3n reads those of `altup.prediction_coefs`."""

        def gemma() -> LoadedModel:
            config = small_config("gemma3n")
            return wrap_model(random_model(config), None, config)

        with pytest.raises(UsageError, match="must run with its adapters, found that it fails"):
            add_adapters(gemma(), AdapterSpec(), seed=0)
        adapted = add_adapters(gemma(), AdapterSpec(keys=["self_attn.q_proj"]), seed=0)
        assert adapter_weights(adapted.model)


class TestFull:
    def test_the_last_blocks(self) -> None:
        student = in_memory()
        train_last_blocks(student, 2)
        names = adapter_weights(student.model)
        assert {name[: len("model.layers.0")] for name in names} == {"model.layers.1", "model.layers.2"}
        assert len(names) == 2 * (len(LINEARS) + 2)

    def test_quantized_weights_are_refused(self) -> None:
        require_dense(in_memory())
        for train in (require_dense, lambda student: train_last_blocks(student, 1)):
            with pytest.raises(UsageError, match="must not be quantized, found"):
                train(in_memory(bits=4))

    @pytest.mark.parametrize("count", [0, 4, -2])
    def test_bad_numbers_of_blocks(self, count: int) -> None:
        with pytest.raises(UsageError, match=f"from 1 to 3, .* found {count}"):
            train_last_blocks(in_memory(), count)


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("bits", [None, 4])
    def test_the_student_comes_closer_and_the_rest_stays(
        self, teacher: LoadedModel, kind: Any, bits: int | None
    ) -> None:
        adapted = add_adapters(in_memory(bits=bits), AdapterSpec(kind, rank=4, scale=4.0), seed=0)
        text = some_text()
        before, trained = weights(adapted.model), adapter_weights(adapted.model).keys()
        distiller = Distiller(
            teacher, adapted, DistillConfig(alpha=1.0), optimizer=optim.Adam(learning_rate=5e-3)
        )
        kl = [distiller.step(text).soft.item() for _ in range(12)]
        assert kl[-1] < 0.9 * kl[0]
        after = weights(adapted.model)
        for name, value in before.items():
            assert np.array_equal(after[name], value) == (name not in trained), name

    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_an_adapted_head_learns(self, teacher: LoadedModel, kind: Any, tie: bool) -> None:
        """One step against MLX's own gradient of the loss on the logits of all tokens."""
        key = "model.embed_tokens" if tie else "lm_head"
        adapted = add_adapters(in_memory(tie=tie), AdapterSpec(kind, rank=4, keys=(key,)), seed=0)
        stir(adapted.model)
        text = some_text(1)
        expected = gradients_on_logits(adapted, teacher, text)
        before = weights(adapted.model)
        Distiller(
            teacher,
            adapted,
            DistillConfig(alpha=1.0, temperature=1.0, max_grad_norm=None),
            optimizer=optim.SGD(learning_rate=0.1),
        ).step(text)
        after = weights(adapted.model)
        assert expected.keys() == adapter_weights(adapted.model).keys()
        for name, slope in expected.items():
            step = (before[name] - after[name]) / 0.1
            np.testing.assert_allclose(step, slope, atol=1e-4 + 1e-3 * np.abs(slope).max(), err_msg=name)


def gradients_on_logits(student: LoadedModel, teacher: LoadedModel, text: TextBatch) -> dict[str, np.ndarray]:
    ids = mx.array(text.token_ids)
    p = mx.softmax(teacher.full(ids, documents=text.documents), axis=-1)
    mask = mx.array(text.loss_mask)

    def loss(model: nn.Module) -> mx.array:
        logits = student.full(ids, documents=text.documents)
        cross = -(p * (logits - mx.logsumexp(logits, axis=-1, keepdims=True))).sum(axis=-1)
        return (cross * mask).sum() / mask.sum()

    _, gradients = nn.value_and_grad(student.model, loss)(student.model)
    return {name: np.array(value) for name, value in tree_flatten(gradients)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "base", num_layers=3, seed=5)


def trained_and_saved(base: Path, folder: Path, spec: AdapterSpec) -> LoadedModel:
    adapted = add_adapters(load_model(base), spec, seed=0)
    stir(adapted.model)
    folder.mkdir()
    save_adapters(adapted.model, folder, {**spec.config(), "model": str(base)})
    return adapted


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("keys", [None, ("self_attn.q_proj", "model.embed_tokens")])
    def test_mlx_lm_reads_what_was_trained(
        self, kind: Any, keys: tuple[str, ...] | None, base: Path, tmp_path: Path
    ) -> None:
        from mlx_lm import load

        spec = AdapterSpec(kind, rank=4, scale=6.0, keys=keys, num_layers=2)
        adapted = trained_and_saved(base, tmp_path / "run", spec)
        text = some_text()
        expected = logits_of(adapted, text)
        assert np.abs(expected - logits_of(load_model(base), text)).max() > 0.1
        model, _ = load(str(base), adapter_path=str(tmp_path / "run"))  # type: ignore[misc]
        np.testing.assert_array_equal(
            np.array(model(mx.array(text.token_ids))), np.array(adapted.full(mx.array(text.token_ids)))
        )
        np.testing.assert_array_equal(logits_of(load_adapted(tmp_path / "run"), text), expected)

    def test_the_configuration_is_as_mlx_lm_writes_it(self, base: Path, tmp_path: Path) -> None:
        trained_and_saved(base, tmp_path / "run", AdapterSpec("dora", rank=4, dropout=0.5, num_layers=2))
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "adapter_config.json",
            "adapters.safetensors",
        ]
        text = (tmp_path / "run" / "adapter_config.json").read_text()
        assert text == json.dumps(
            {
                "fine_tune_type": "dora",
                "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.5},
                "model": str(base),
                "num_layers": 2,
            },
            indent=4,
        )

    def test_going_on_from_a_file(self, base: Path, tmp_path: Path) -> None:
        spec = AdapterSpec(rank=4, num_layers=1)
        adapted = trained_and_saved(base, tmp_path / "run", spec)
        file = tmp_path / "run" / "adapters.safetensors"
        again = add_adapters(load_model(base), spec, seed=9)
        assert load_adapter_weights(again, file, spec=spec) == []
        np.testing.assert_array_equal(logits_of(again, some_text()), logits_of(adapted, some_text()))
        wider = AdapterSpec(rank=4, num_layers=2)
        missing = load_adapter_weights(add_adapters(load_model(base), wider, seed=9), file, spec=wider)
        assert len(missing) == 2 * len(LINEARS)
        assert all(name.startswith("model.layers.1.") for name in missing)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (AdapterSpec(rank=4, scale=5.0), "must be lora adapters of scale 5, found lora of scale 20"),
            (AdapterSpec("dora", rank=4), "must be dora adapters of scale 20, found lora"),
            (AdapterSpec(rank=8), r"must be trained here with the shape it has, \(.*4.*\), found \(.*8.*\)"),
            (AdapterSpec(rank=4, num_layers=1), r"layers.1.* the shape it has, \(.*\), found no such"),
        ],
    )
    def test_files_for_other_adapters(
        self, spec: AdapterSpec, message: str, base: Path, tmp_path: Path
    ) -> None:
        trained_and_saved(base, tmp_path / "run", AdapterSpec(rank=4, num_layers=2))
        adapted = add_adapters(load_model(base), spec, seed=0)
        with pytest.raises(UsageError, match=message):
            load_adapter_weights(adapted, tmp_path / "run" / "adapters.safetensors", spec=spec)

    def test_things_that_are_no_adapters(self, base: Path, tmp_path: Path) -> None:
        adapted = add_adapters(load_model(base), AdapterSpec(), seed=0)
        (tmp_path / "text.safetensors").write_text("no")
        for path in (tmp_path, tmp_path / "text.safetensors", tmp_path / "missing.safetensors"):
            with pytest.raises(UsageError, match="give the file itself"):
                load_adapter_weights(adapted, path)
        with pytest.raises(ModelError, match="must name a model"):
            load_adapted(tmp_path)
        trained_and_saved(base, tmp_path / "run", AdapterSpec())
        config = tmp_path / "run" / "adapter_config.json"
        config.write_text(config.read_text().replace('"rank": 8', '"rank": 3'))
        with pytest.raises(ModelError, match="do not fit"):
            load_adapted(tmp_path / "run")


class TestMerging:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tie", [True, False])
    def test_merged_weights_compute_the_same(self, kind: Any, tie: bool) -> None:
        keys = (*LINEARS, "model.embed_tokens" if tie else "lm_head")
        adapted = add_adapters(in_memory(tie=tie), AdapterSpec(kind, keys=keys), seed=0)
        stir(adapted.model)
        plain = in_memory(tie=tie)
        before = logits_of(plain, some_text())
        expected = logits_of(adapted, some_text())
        plain.model.load_weights(list(merged_weights(adapted.model).items()), strict=True)
        found = logits_of(plain, some_text())
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.abs(found - before).max() > 0.1
        np.testing.assert_array_equal(logits_of(adapted, some_text()), expected)

    def test_quantized_layers_stay_quantized(self) -> None:
        adapted = add_adapters(in_memory(bits=8), AdapterSpec(), seed=0)
        stir(adapted.model, 0.01)
        plain = in_memory(bits=8)
        plain.model.load_weights(list(merged_weights(adapted.model).items()), strict=True)
        error = np.abs(logits_of(plain, some_text()) - logits_of(adapted, some_text())).max()
        assert 0 < error < 0.3

"""Models taken apart: body, head and blocks of every architecture against its own plain call."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from pmetal_distill.models import (
    wrap_model,
)
from schemas.errors import ModelError
from tests.tiny import random_model, tiny_config
from tests.zoo import SPLIT, UNPACKED, array, made, separately, some_tokens
from tests.zoo.configs import small_config


class TestBodyAndHead:
    @pytest.mark.parametrize("name", SPLIT)
    def test_together_they_are_the_plain_call(self, name: str) -> None:
        loaded, ids = made(name), some_tokens(2, 11)
        expected = array(loaded.model(ids))
        hidden = loaded.hidden(ids)
        assert hidden.final.shape == (2, 11, 32)
        assert (loaded.hidden_size, loaded.num_layers, loaded.vocab_size) == (32, 4, 320)
        np.testing.assert_allclose(array(loaded.logits(hidden.final)), expected, atol=1e-4)
        np.testing.assert_allclose(array(loaded.full(ids)), expected, atol=1e-4)
        assert loaded.notes == ()

    @pytest.mark.parametrize("name", SPLIT)
    def test_the_head_works_on_chunks(self, name: str) -> None:
        loaded, ids = made(name), some_tokens(2, 10)
        expected = array(loaded.model(ids)).reshape(20, 320)
        rows = loaded.hidden(ids).final.reshape(20, 32)
        chunks = [array(loaded.logits(rows[start : start + 7])) for start in range(0, 20, 7)]
        np.testing.assert_allclose(np.concatenate(chunks), expected, atol=1e-4)

    @pytest.mark.parametrize("name", SPLIT)
    def test_the_head_is_the_matrix_it_says(self, name: str) -> None:
        _, path, tied, scale, softcap = SPLIT[name]
        loaded, ids = made(name), some_tokens(1, 9)
        head = loaded.head
        assert head is not None
        assert (head.path, head.tied, head.softcap, head.quantized) == (path, tied, softcap, False)
        assert head.scale == scale
        hidden = loaded.hidden(ids).final * 5  # into the soft-cap
        raw = array(hidden) @ array(head.weight).T + (0 if head.bias is None else array(head.bias))
        scaled = raw * (scale or 1.0)
        expected = scaled if softcap is None else softcap * np.tanh(scaled / softcap)
        np.testing.assert_allclose(array(head.logits(hidden)), expected, atol=1e-3)
        np.testing.assert_allclose(array(loaded.logits(hidden)), expected, atol=1e-3)

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_numbers_that_only_mlx_lm_knows(self, dtype: mx.Dtype) -> None:
        """Their scale and soft-cap are defaults of `ModelArgs`, and stand in no config.json."""
        config = small_config("muse_glimmer")
        assert not config.keys() & {"final_logit_softcapping", "output_multiplier"}
        model = random_model(config)
        model.set_dtype(dtype)
        head = wrap_model(model, None, config).head
        assert head is not None
        assert head.softcap == model.args.final_logit_softcapping == 20.0
        assert head.scale == pytest.approx(model.args.output_multiplier, rel=2e-3)

    def test_a_head_with_bias(self) -> None:
        head = made("phi").head
        assert head is not None
        assert head.bias is not None
        assert head.bias.shape == (320,)

    def test_layers_are_the_outputs_of_the_blocks(self) -> None:
        loaded, ids = made("llama"), some_tokens(2, 7)
        body: Any = loaded.model.model
        states, expected = body.embed_tokens(ids), []
        for block in body.layers:
            states = block(states, "causal", None)
            expected.append(array(states))
        hidden = loaded.hidden(ids, layers=[2, 0, -1])
        assert list(hidden.layers) == [2, 0, -1]
        for index in (0, 2, -1):
            np.testing.assert_allclose(array(hidden.layers[index]), expected[index], atol=1e-5)
        np.testing.assert_allclose(array(hidden.final), array(body.norm(states)), atol=1e-5)

    @pytest.mark.parametrize("name", [*SPLIT, *UNPACKED])
    def test_layers_of_any_model(self, name: str) -> None:
        loaded, ids = made(name), some_tokens(2, 6)
        hidden = loaded.hidden(ids, layers=range(4))
        assert {index: states.shape for index, states in hidden.layers.items()} == dict.fromkeys(
            range(4), (2, 6, 32)
        )
        np.testing.assert_allclose(array(hidden.final), array(loaded.hidden(ids).final), atol=1e-5)
        rows = [array(hidden.layers[index]) for index in range(4)]
        assert all(np.abs(a - b).max() > 1e-3 for a, b in pairwise(rows))

    def test_no_such_layer(self) -> None:
        with pytest.raises(ValueError, match="layer must be from 0 to 3, found 4"):
            made("llama").hidden(some_tokens(1, 4), layers=[4])

    def test_the_model_is_left_as_it_was(self) -> None:
        loaded = made("llama untied")
        before: Any = tree_flatten(loaded.model.parameters())
        hidden = loaded.hidden(some_tokens(2, 6), documents=np.array([[0, 0, 1, 1, 1, 1]] * 2), layers=[1])
        mx.eval(loaded.logits(hidden.final))
        after: Any = tree_flatten(loaded.model.parameters())
        assert [name for name, _ in before] == [name for name, _ in after]
        assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
        assert all(type(block).__name__ == "TransformerBlock" for block in loaded.model.layers)


class TestWithoutParts:
    @pytest.mark.parametrize("name", UNPACKED)
    def test_one_document_per_sequence(self, name: str) -> None:
        loaded, ids = made(name), some_tokens(2, 8)
        assert not loaded.supports_packing
        assert any("one document per sequence" in note for note in loaded.notes)
        single = np.array([[3] * 8, [5] * 6 + [-1] * 2])
        found = loaded.logits(loaded.hidden(ids, documents=single).final)
        np.testing.assert_allclose(array(found), array(loaded.model(ids)), atol=1e-4)
        mixed = np.array([[0] * 3 + [1] * 5, [4, 4, -1, -1, 9, 9, 9, 9]])
        expected = separately(loaded.model, ids, mixed)[mixed >= 0]
        for documents in (mixed, mx.array(mixed)):
            states = loaded.hidden(ids, documents=documents, layers=[1])
            assert states.layers[1].shape == (2, 8, 32)
            np.testing.assert_allclose(array(loaded.logits(states.final))[mixed >= 0], expected, atol=1e-3)
            np.testing.assert_allclose(array(loaded.full(ids, documents))[mixed >= 0], expected, atol=1e-3)
        with pytest.raises(ModelError, match=r"inside mx\.compile.*one document per sequence"):
            mx.compile(loaded.full)(ids, mx.array(mixed))

    def test_a_head_inside_the_body_leaves_the_full_call(self) -> None:
        loaded, ids = made("gpt_neox"), some_tokens(2, 8)
        assert not loaded.splits
        assert loaded.head is None
        assert (loaded.vocab_size, loaded.hidden_size) == (320, 0)
        assert any("cannot be split off" in note for note in loaded.notes)
        np.testing.assert_allclose(array(loaded.full(ids)), array(loaded.model(ids)), atol=1e-4)
        with pytest.raises(ModelError, match="use its full call"):
            loaded.hidden(ids)
        with pytest.raises(ModelError, match="use its full call"):
            loaded.logits(mx.zeros((1, 32)))

    def test_a_head_that_is_no_matrix_keeps_its_own_call(self) -> None:
        class Odd(type(random_model(tiny_config()))):  # type: ignore[misc]
            def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
                logits: mx.array = super().__call__(inputs, cache)
                return logits + mx.sin(logits)

        config = tiny_config()
        model = random_model(config)
        model.__class__ = Odd
        loaded = wrap_model(model, None, config)
        assert loaded.splits
        assert loaded.head is None
        assert any("not a matrix" in note for note in loaded.notes)
        ids = some_tokens(1, 6)
        np.testing.assert_allclose(
            array(loaded.logits(loaded.hidden(ids).final)), array(model(ids)), atol=1e-4
        )

    def test_a_model_that_ignores_the_mask_does_not_pack(self) -> None:
        class Leaky(type(random_model(tiny_config()))):  # type: ignore[misc]
            def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
                logits: mx.array = super().__call__(inputs)
                return logits

        config = tiny_config()
        model = random_model(config)
        model.__class__ = Leaky
        assert not wrap_model(model, None, config).supports_packing

    def test_a_model_that_fails(self) -> None:
        config = tiny_config()
        model = random_model(config)
        model.model.norm.weight = mx.ones(5)
        with pytest.raises(ModelError, match="fails on a few tokens"):
            wrap_model(model, None, config)


class TestTraining:
    def test_gradients_are_those_of_the_plain_call(self) -> None:
        loaded, ids = made("llama"), some_tokens(2, 9)
        weights = mx.array(np.random.default_rng(1).standard_normal((2, 9, 320)).astype(np.float32))

        def plain(model: Any) -> mx.array:
            return (model(ids) * weights).sum()

        def apart(_: Any) -> mx.array:
            return (loaded.logits(loaded.hidden(ids).final) * weights).sum()

        expected, found = (
            dict(tree_flatten(nn.value_and_grad(loaded.model, f)(loaded.model)[1])) for f in (plain, apart)
        )
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(
                array(found[name]), array(gradient), rtol=1e-3, atol=1e-3, err_msg=name
            )

    def test_gradients_of_packed_documents_are_the_sum_of_each(self) -> None:
        loaded, ids = made("llama untied"), some_tokens(1, 12)
        documents = np.array([[0] * 5 + [1] * 7])

        def packed(_: Any) -> mx.array:
            hidden = loaded.hidden(ids, documents=documents, layers=[1])
            return (loaded.logits(hidden.final) ** 2).sum() + (hidden.layers[1] ** 2).sum()

        def apart(_: Any) -> mx.array:
            both = [loaded.hidden(part, layers=[1]) for part in (ids[:, :5], ids[:, 5:])]
            return sum((loaded.logits(h.final) ** 2).sum() + (h.layers[1] ** 2).sum() for h in both)  # type: ignore[return-value]

        expected, found = (
            dict(tree_flatten(nn.value_and_grad(loaded.model, f)(loaded.model)[1])) for f in (apart, packed)
        )
        for name, gradient in expected.items():
            scale = np.abs(array(gradient)).max()
            np.testing.assert_allclose(array(found[name]), array(gradient), atol=1e-4 * scale, err_msg=name)

    def test_head_and_states_follow_an_update(self) -> None:
        config = tiny_config(tie=False)
        loaded, ids = wrap_model(random_model(config), None, config), some_tokens(1, 5)
        before = array(loaded.hidden(ids).final)
        loaded.model.update(tree_map(lambda w: w * 1.5, loaded.model.parameters()))
        assert loaded.head is not None
        assert loaded.head.weight is loaded.model.lm_head.weight
        assert np.abs(array(loaded.hidden(ids).final) - before).max() > 1e-2
        np.testing.assert_allclose(
            array(loaded.logits(loaded.hidden(ids).final)), array(loaded.model(ids)), atol=1e-4
        )

    def test_under_compile(self) -> None:
        loaded, ids = made("llama"), some_tokens(2, 9)
        documents = mx.array([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
        compiled: Callable[..., mx.array] = mx.compile(lambda i, d: loaded.hidden(i, documents=d).final)
        expected = loaded.hidden(ids, documents=documents).final
        np.testing.assert_allclose(array(compiled(ids, documents)), array(expected), atol=1e-5)


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
    @pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "granite", "nanochat", "gpt2", "mamba"])
    def test_the_same_parts_are_found(self, name: str, dtype: mx.Dtype) -> None:
        expected = made(name)
        model = random_model(expected.config)
        model.set_dtype(dtype)
        found = wrap_model(model, None, expected.config)
        assert found.notes == expected.notes
        assert found.anatomy.packing == expected.anatomy.packing
        assert found.head is not None
        assert expected.head is not None
        assert (found.head.path, found.head.scale, found.head.softcap) == (
            expected.head.path,
            expected.head.scale,
            expected.head.softcap,
        )


class TestQuantized:
    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_body_head_and_matrix(self, tie: bool, bits: int) -> None:
        config = tiny_config(tie=tie)
        model = random_model(config)
        nn.quantize(model, group_size=32, bits=bits)
        loaded, ids = wrap_model(model, None, config), some_tokens(2, 8)
        hidden = loaded.hidden(ids).final
        np.testing.assert_allclose(array(loaded.logits(hidden)), array(model(ids)), atol=1e-4)
        head = loaded.head
        assert head is not None
        assert (head.quantized, head.tied, head.weight.shape) == (True, tie, (320, 32))
        np.testing.assert_allclose(array(hidden) @ array(head.weight).T, array(model(ids)), atol=1e-3)
        documents = np.array([[0] * 3 + [1] * 5] * 2)
        np.testing.assert_allclose(
            array(loaded.full(ids, documents)), separately(model, ids, documents), atol=1e-4
        )

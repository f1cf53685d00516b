"""Documents that share a sequence do not see each other: packed against separate, and the mask's entries."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from pmetal_distill.modelling.documents import DocumentMask, holds_one_document
from pmetal_distill.models import wrap_model
from tests.tiny import random_model, tiny_config
from tests.zoo import SPLIT, UNSPLIT, array, made, separately, some_tokens


class TestDocuments:
    @pytest.mark.parametrize("name", [*SPLIT, *UNSPLIT])
    def test_packed_is_separate(self, name: str) -> None:
        loaded, ids = made(name), some_tokens(3, 24)
        documents = np.array([[0] * 9 + [1] * 15, [0] * 4 + [1] * 10 + [2] * 10, [7] * 24])
        expected = separately(loaded.model, ids, documents)
        for given_documents in (documents, mx.array(documents)):
            np.testing.assert_allclose(array(loaded.full(ids, given_documents)), expected, atol=1e-4)
            if loaded.splits:
                hidden = loaded.hidden(ids, documents=given_documents).final
                np.testing.assert_allclose(array(loaded.logits(hidden)), expected, atol=1e-4)

    @pytest.mark.parametrize("name", ["deepseek_v32", "longcat_flash", "gemma3n"])
    def test_layers_of_several_caches_and_shared_ones(self, name: str) -> None:
        """As the model computes it when it generates text."""
        loaded, ids = made(name), some_tokens(2, 24)
        documents = np.array([[0] * 9 + [1] * 15, [7] * 24])
        expected = separately(loaded.model, ids, documents, lambda: make_prompt_cache(loaded.model))
        np.testing.assert_allclose(array(loaded.full(ids, documents)), expected, atol=1e-3)
        whole = array(loaded.model(ids, cache=make_prompt_cache(loaded.model)))
        np.testing.assert_allclose(array(loaded.full(ids)), whole, atol=1e-3)
        assert loaded.anatomy.needs_caches is (name == "gemma3n")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("gpt2", "counts positions from the beginning of a sequence"),
            ("llama4", "a mask of its own"),
            ("mamba", "carry a state from token to token"),
            ("deepseek_v41", "caches are of a kind of their own"),
        ],
    )
    def test_why_a_model_does_not_pack(self, name: str, reason: str) -> None:
        notes = [note for note in made(name).notes if "one document per sequence" in note]
        assert len(notes) == 1
        assert reason in notes[0]

    def test_a_model_that_generates_with_another_call_than_it_trains_with(self) -> None:
        class Two(type(random_model(tiny_config()))):  # type: ignore[misc]
            def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
                real = cache is not None and isinstance(cache[0], KVCache)
                logits: mx.array = super().__call__(inputs)
                return mx.tanh(logits) if real else logits

        config = tiny_config()
        model = random_model(config)
        model.__class__ = Two
        loaded = wrap_model(model, None, config)
        assert any("something else with a cache" in note for note in loaded.notes)
        np.testing.assert_array_equal(array(loaded.full(some_tokens(1, 6))), array(model(some_tokens(1, 6))))

    def test_a_model_whose_attention_takes_no_batch_of_masks(self) -> None:
        assert made("gemma2").anatomy.packing == "rows"
        assert made("llama").anatomy.packing == "batch"

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**20))
    def test_any_division_into_documents(self, lengths: list[int], seed: int) -> None:
        loaded = made("llama windows")
        documents = np.repeat(np.arange(len(lengths)), lengths)[None]
        ids = some_tokens(1, documents.shape[1], seed=seed)
        expected = separately(loaded.model, ids, documents)
        np.testing.assert_allclose(array(loaded.full(ids, documents)), expected, atol=1e-4)

    def test_layers_do_not_cross_either(self) -> None:
        loaded, ids = made("llama"), some_tokens(2, 12)
        documents = np.array([[0] * 5 + [1] * 7] * 2)
        hidden = loaded.hidden(ids, documents=documents, layers=[1])
        alone = loaded.hidden(ids[:, 5:], layers=[1])
        np.testing.assert_allclose(array(hidden.layers[1][:, 5:]), array(alone.layers[1]), atol=1e-4)

    def test_without_documents_windows_hold(self) -> None:
        loaded, ids = made("llama windows"), some_tokens(1, 20)
        changed = mx.array(np.where(np.arange(20) == 0, 5, np.array(ids)))
        np.testing.assert_allclose(array(loaded.full(ids)), array(loaded.model(ids)), atol=1e-4)
        # Layers 0 and 2 see 4 tokens; what layer 1 sees of token 0 is the difference to an all-windows model.
        assert np.abs(array(loaded.full(ids) - loaded.full(changed)))[0, -1].max() > 1e-4

    def test_windows_that_only_the_cache_imposes(self) -> None:
        class Windowed(type(random_model(tiny_config()))):  # type: ignore[misc]
            def make_cache(self) -> list[Any]:
                return [RotatingKVCache(max_size=8) for _ in self.layers]

        config, ids = tiny_config(), some_tokens(1, 30)
        model = random_model(config)
        model.__class__ = Windowed
        loaded = wrap_model(model, None, config)
        assert loaded.supports_packing

        def alone(part: mx.array) -> np.ndarray:
            return array(model(part, cache=model.make_cache()))

        np.testing.assert_allclose(array(loaded.full(ids)), alone(ids), atol=1e-4)
        documents = np.array([[0] * 13 + [1] * 17])
        expected = np.concatenate([alone(ids[:, :13]), alone(ids[:, 13:])], axis=1)
        np.testing.assert_allclose(array(loaded.full(ids, documents)), expected, atol=1e-4)
        assert np.abs(alone(ids) - array(model(ids))).max() > 1e-2

    @pytest.mark.parametrize("window", [None, 1, 3])
    def test_mask_entries(self, window: int | None) -> None:
        documents = np.array([[0, 0, 1, 1, 1, 0], [4, 4, 4, 4, -1, -1]])
        found = np.array(DocumentMask(mx.array(documents)).mask(6, window))
        for row, numbers in enumerate(documents):
            for query in range(6):
                for key in range(6):
                    sees = key <= query and numbers[key] == numbers[query]
                    sees = sees and (window is None or query - key < window)
                    assert found[row, 0, query, key] == sees

    @pytest.mark.parametrize(
        ("documents", "single"),
        [
            ([[0, 0, 0]], True),
            ([[0, 0, 0], [9, 9, 9]], True),
            ([[2, 2, -1]], True),
            ([[0, 0, 1]], False),
            ([[0, -1, 0]], False),
            ([[-1, 0, 0]], False),
            ([[0, 0, 0], [0, 1, 1]], False),
        ],
    )
    def test_recognising_single_documents(self, documents: list[list[int]], single: bool) -> None:
        assert holds_one_document(np.array(documents)) is single

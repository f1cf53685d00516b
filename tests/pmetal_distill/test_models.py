"""Models taken apart: every architecture against its own plain call, loading errors, saving, fingerprints."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from tokenizers import Tokenizer, normalizers, processors

from pmetal_distill.modelling.documents import DocumentMask, holds_one_document
from pmetal_distill.models import (
    LoadedModel,
    cache_home,
    chat_template_fingerprint,
    compare_tokenizers,
    load_model,
    load_tokenizer,
    model_fingerprint,
    save_model,
    tokenizer_fingerprint,
    wrap_model,
)
from schemas.errors import ModelError, UsageError
from tests.tiny import build_tiny_model, random_model, save_tokenizer, tiny_config
from tests.tiny_gguf import build_tiny_gguf

ALTERNATING = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

# name -> (configuration, head path, tied, scale, softcap)
SPLIT: dict[str, tuple[dict[str, Any], str, bool, float | None, float | None]] = {
    "llama": ({}, "model.embed_tokens", True, None, None),
    "llama untied": ({"tie": False}, "lm_head", False, None, None),
    "llama windows": (
        {"sliding_window": 4, "layer_types": ALTERNATING},
        "model.embed_tokens",
        True,
        None,
        None,
    ),
    "qwen2": ({}, "model.embed_tokens", True, None, None),
    "qwen3": ({"tie": False}, "lm_head", False, None, None),
    "gemma2": ({}, "model.embed_tokens", True, None, 30.0),
    "gemma3_text": (
        {
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": 8,
        },
        "lm_head",
        False,
        None,
        None,
    ),
    "cohere": ({"layer_norm_eps": 1e-5, "logit_scale": 0.0625}, "model.embed_tokens", True, 0.0625, None),
    "cohere2": (
        {
            "layer_norm_eps": 1e-5,
            "layer_norm_bias": False,
            "sliding_window": 4,
            "sliding_window_pattern": 2,
            "logit_scale": 0.25,
        },
        "model.embed_tokens",
        True,
        0.25,
        None,
    ),
    "granite": (
        {
            "logits_scaling": 8.0,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_bias": False,
            "mlp_bias": False,
        },
        "model.embed_tokens",
        True,
        0.125,
        None,
    ),
    "phi3": ({"rope_scaling": None}, "model.embed_tokens", True, None, None),
    "phi": ({"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5}, "lm_head", False, None, None),
    "minicpm": (
        {"dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 12.0, "tie": False},
        "lm_head",
        False,
        0.25,
        None,
    ),
    "nanochat": ({}, "lm_head", False, None, 15.0),
    "mistral3": ({"text_config": tiny_config()}, "language_model.model.embed_tokens", True, None, None),
    "mixtral": ({"num_local_experts": 4, **MOE}, "model.embed_tokens", True, None, None),
}
UNPACKED: dict[str, dict[str, Any]] = {
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": True,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
}
UNSPLIT = {"gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.25}}
_made: dict[str, LoadedModel] = {}


def made(name: str) -> LoadedModel:
    """A random model of the table, made once."""
    if name not in _made:
        options = SPLIT[name][0] if name in SPLIT else {**UNPACKED, **UNSPLIT}[name]
        config = tiny_config(model_type=name.split(" ")[0], **options)
        _made[name] = wrap_model(random_model(config), None, config)
    return _made[name]


def some_tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 320, shape).astype(np.int32))


def array(values: mx.array) -> np.ndarray:
    return np.array(values.astype(mx.float32), np.float64)


def separately(model: Any, token_ids: mx.array, documents: np.ndarray) -> np.ndarray:
    """The plain call on every document alone, put back together."""
    ids, out = np.array(token_ids), np.zeros((*token_ids.shape, 320))
    for row in range(len(ids)):
        for number in np.unique(documents[row]):
            where = documents[row] == number
            out[row, where] = array(model(mx.array(ids[row, where][None])))[0]
    return out


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
        for call in (loaded.hidden, loaded.full):
            with pytest.raises(ModelError, match="one document per sequence"):
                call(ids, documents=np.array([[0] * 4 + [1] * 4] * 2))

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

    def test_a_model_that_fails(self) -> None:
        config = tiny_config()
        model = random_model(config)
        model.model.norm.weight = mx.ones(5)
        with pytest.raises(ModelError, match="fails on 8 tokens"):
            wrap_model(model, None, config)


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A fresh tiny model's folder, to be spoiled."""
    return build_tiny_model(tmp_path / "model", num_layers=2)


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


class TestLoading:
    def test_sizes_tokenizer_and_source(self, tiny_teacher: Path) -> None:
        loaded = load_model(tiny_teacher)
        assert (loaded.vocab_size, loaded.hidden_size, loaded.num_layers) == (320, 32, 4)
        assert loaded.source == str(tiny_teacher)
        assert loaded.folder == tiny_teacher
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("naïve 東京")) == "naïve 東京"
        assert loaded.tokenizer.eos_token_id == 2

    @pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
    def test_half_precision_runs_as_float32_on_the_cpu(self, folder: Path, dtype: mx.Dtype) -> None:
        if mx.default_device().type != mx.cpu:
            pytest.skip("half precision stays as it is on a GPU")
        weights: Any = mx.load(str(folder / "model.safetensors"))
        halves = {name: tensor.astype(dtype) for name, tensor in weights.items()}
        mx.save_safetensors(str(folder / "model.safetensors"), halves)
        loaded = load_model(folder)
        weights = dict(tree_flatten(loaded.model.parameters()))
        assert {tensor.dtype for tensor in weights.values()} == {mx.float32}
        assert loaded.hidden(some_tokens(1, 4)).final.dtype == mx.float32

    def test_a_gguf_file_is_converted_once(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PMETAL_HOME", str(tmp_path / "home"))
        assert cache_home() == tmp_path / "home"
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        loaded, plain = load_model(path), load_model(folder)
        assert loaded.folder is not None
        assert loaded.folder.is_relative_to(tmp_path / "home")
        ids = some_tokens(1, 9)
        np.testing.assert_allclose(array(loaded.full(ids)), array(plain.full(ids)), atol=1e-5)
        before = (loaded.folder / "model.safetensors").stat().st_mtime_ns
        again = load_model(str(path))
        assert (again.folder, again.source) == (loaded.folder, str(path))
        assert (loaded.folder / "model.safetensors").stat().st_mtime_ns == before
        assert model_fingerprint(again) == model_fingerprint(loaded)
        assert compare_tokenizers(loaded.tokenizer, plain.tokenizer) == []

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda f: (f / "config.json").unlink(), ["not a model", "config.json"]),
            (lambda f: (f / "config.json").write_text("{not json"), ["config.json", "not JSON"]),
            (lambda f: (f / "config.json").write_text("[]"), ["model_type"]),
            (lambda f: edit_json(f / "config.json", model_type=None), ["model_type"]),
            (lambda f: edit_json(f / "config.json", model_type="hal9000"), ["hal9000", "not supported"]),
            (lambda f: edit_json(f / "config.json", num_attention_heads=None), ["num_attention_heads"]),
            (lambda f: edit_json(f / "config.json", num_hidden_layers=3), ["Missing"]),
            (lambda f: edit_json(f / "config.json", num_hidden_layers=1), ["not in model"]),
            (lambda f: edit_json(f / "config.json", intermediate_size=48), ["shape"]),
            (lambda f: edit_json(f / "config.json", model_file="evil.py"), ["evil.py", "trust"]),
            (lambda f: (f / "model.safetensors").unlink(), ["safetensors"]),
            (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), ["cannot load"]),
            (lambda f: shorten(f / "model.safetensors"), ["cannot load"]),
            (
                lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
                ["no tokenizer"],
            ),
            (lambda f: (f / "tokenizer.json").write_text('{"model": 3}'), ["tokenizer cannot be read"]),
        ],
    )
    def test_spoiled_folders(self, folder: Path, spoil: Callable[[Path], Any], words: list[str]) -> None:
        spoil(folder)
        with pytest.raises(ModelError) as caught:
            load_model(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert all(word in message for word in words), message

    def test_code_runs_only_if_trusted(self, folder: Path) -> None:
        marker = folder / "ran"
        (folder / "own.py").write_text(
            f"open({str(marker)!r}, 'w').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
        )
        edit_json(folder / "config.json", model_file="own.py")
        with pytest.raises(ModelError):
            load_model(folder)
        assert not marker.exists()
        loaded = load_model(folder, trust_remote_code=True)
        assert marker.exists()
        copy = save_model(loaded, folder.parent / "copy")
        assert load_model(copy, trust_remote_code=True).num_layers == 2

    @pytest.mark.parametrize(
        "name", ["/no/such/folder", "./absent", "absent.gguf", "a/b/c", "owner/absent.gguf"]
    )
    def test_missing_paths(self, name: str) -> None:
        with pytest.raises(ModelError, match="no such file or folder"):
            load_model(name)

    def test_another_kind_of_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.bin"
        path.write_bytes(b"x")
        with pytest.raises(ModelError, match=r"must be a folder or a \.gguf file"):
            load_model(path)

    def test_a_hub_id_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=r"nobody/nothing: no such folder, and the hub does not give it"):
            load_model("nobody/nothing")


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


class TestSaving:
    @pytest.mark.parametrize("tie", [True, False])
    def test_mlx_lm_loads_and_generates(self, tie: bool, tmp_path: Path) -> None:
        import mlx_lm

        loaded = load_model(build_tiny_model(tmp_path / "model", tie=tie))
        loaded.model.update(tree_map(lambda w: w * 1.1, loaded.model.parameters()))
        out = save_model(loaded, tmp_path / "saved")
        model, tokenizer = mlx_lm.load(str(out))[:2]
        ids = some_tokens(2, 9)
        np.testing.assert_array_equal(array(model(ids)), array(loaded.model(ids)))
        assert tokenizer.chat_template == loaded.tokenizer.chat_template
        assert isinstance(mlx_lm.generate(model, tokenizer, prompt="The quick", max_tokens=3), str)

    def test_quantized_models(self, tmp_path: Path) -> None:
        loaded = load_model(build_tiny_model(tmp_path / "model"))
        nn.quantize(loaded.model, group_size=32, bits=4)
        config = loaded.config | {"quantization": {"group_size": 32, "bits": 4}}
        out = save_model(loaded.model, tmp_path / "saved", tokenizer=loaded.tokenizer, config=config)
        ids = some_tokens(1, 8)
        again = load_model(out)
        np.testing.assert_allclose(array(again.full(ids)), array(loaded.model(ids)), atol=1e-5)
        assert again.head is not None
        assert again.head.quantized

    def test_several_weight_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        loaded = load_model(build_tiny_model(tmp_path / "model"))
        half = len(tree_flatten(loaded.model.parameters())) // 2

        def two(weights: dict[str, mx.array]) -> list[dict[str, mx.array]]:
            items = list(weights.items())
            return [dict(items[:half]), dict(items[half:])]

        monkeypatch.setattr("mlx_lm.utils.make_shards", two)
        out = save_model(loaded, tmp_path / "saved")
        index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(index.values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
        assert index.keys() == dict(tree_flatten(loaded.model.parameters())).keys()
        ids = some_tokens(1, 8)
        np.testing.assert_array_equal(array(load_model(out).full(ids)), array(loaded.full(ids)))

    def test_a_failure_leaves_nothing(self, tmp_path: Path) -> None:
        class Full:
            def save_pretrained(self, folder: Path) -> None:
                (folder / "tokenizer.json").write_text("{")
                raise OSError(28, "No space left on device")

        model = random_model(tiny_config())
        with pytest.raises(OSError, match="No space left"):
            save_model(model, tmp_path / "runs" / "saved", tokenizer=Full(), config=tiny_config())
        assert list((tmp_path / "runs").iterdir()) == []

    def test_a_folder_in_use(self, folder: Path) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UsageError, match="must not exist yet"):
            save_model(load_model(folder), folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_a_folder_that_cannot_be_made(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="cannot be made"):
            save_model(load_model(folder), folder / "config.json" / "saved")

    def test_a_plain_model_needs_its_parts(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="tokenizer and config"):
            save_model(random_model(tiny_config()), tmp_path / "saved")


class TestModelFingerprint:
    def test_of_folders(self, folder: Path, tmp_path: Path) -> None:
        expected = model_fingerprint(load_model(folder))
        copy = shutil.copytree(folder, tmp_path / "copy")
        edit_json(copy / "config.json", eos_token_id=1, torch_dtype="float32")
        assert model_fingerprint(load_model(copy)) == expected
        edit_json(copy / "config.json", rope_theta=20000.0)
        assert model_fingerprint(load_model(copy)) != expected
        other = build_tiny_model(tmp_path / "other", num_layers=2, seed=5)
        assert model_fingerprint(load_model(other)) != expected

    def test_of_models_in_memory(self) -> None:
        config = tiny_config()
        first, same, other = (wrap_model(random_model(config, seed=seed), None, config) for seed in (0, 0, 1))
        assert model_fingerprint(first) == model_fingerprint(same) != model_fingerprint(other)
        same.model.model.norm.weight = same.model.model.norm.weight * 2
        assert model_fingerprint(first) != model_fingerprint(same)
        first.model.set_dtype(mx.bfloat16)
        assert model_fingerprint(first) == model_fingerprint(first)


class TestTokenizers:
    def test_saving_changes_nothing(self, folder: Path, tmp_path: Path) -> None:
        loaded = load_model(folder)
        again = load_model(save_model(loaded, tmp_path / "saved"))
        assert tokenizer_fingerprint(again.tokenizer) == tokenizer_fingerprint(loaded.tokenizer)
        assert chat_template_fingerprint(again.tokenizer) == chat_template_fingerprint(loaded.tokenizer)
        assert compare_tokenizers(again.tokenizer, loaded.tokenizer) == []

    def test_padding_of_the_embedding_plays_no_part(self, tiny_teacher: Path, tmp_path: Path) -> None:
        padded = build_tiny_model(tmp_path / "padded", vocab_size=384, tokenizer_size=320)
        a, b = load_model(tiny_teacher), load_model(padded)
        assert (a.vocab_size, b.vocab_size) == (320, 384)
        assert compare_tokenizers(a.tokenizer, b.tokenizer) == []
        assert tokenizer_fingerprint(a.tokenizer) == tokenizer_fingerprint(b.tokenizer)

    def test_padding_and_truncation_settings_play_no_part(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        before = tokenizer_fingerprint(tokenizer)
        tokenizer.backend_tokenizer.enable_truncation(7)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        assert tokenizer_fingerprint(tokenizer) == before

    def test_files_of_the_same_tokenizer(self, folder: Path, tmp_path: Path) -> None:
        """As different converters write it."""
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 320, "content": "<|extra|>"})
        (folder / "tokenizer.json").write_text(json.dumps(content))
        content["model"]["vocab"]["<|extra|>"] = 320
        for token in content["added_tokens"]:
            token["special"] = False
        content["model"]["unk_token"] = "<|endoftext|>"
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"]]}
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        }
        other = shutil.copytree(folder, tmp_path / "other")
        (other / "tokenizer.json").write_text(json.dumps(content))
        a, b = load_tokenizer(folder), load_tokenizer(other)
        for text in ("<|im_start|>user\nHi<|extra|> 12", "naïve 東京"):
            assert a.encode(text) == b.encode(text)
        assert compare_tokenizers(a, b) == []
        assert tokenizer_fingerprint(a) == tokenizer_fingerprint(b)

    def test_a_begin_token_counts(self, folder: Path, tmp_path: Path) -> None:
        changed = shutil.copytree(folder, tmp_path / "changed")
        backend = Tokenizer.from_file(str(changed / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        backend.save(str(changed / "tokenizer.json"))
        assert compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed)) == [
            "post_processor differs"
        ]

    def test_other_tokens(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "larger").mkdir()
        save_tokenizer(tmp_path / "larger", vocab_size=330)
        a, b = load_tokenizer(folder), load_tokenizer(tmp_path / "larger")
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)
        differences = compare_tokenizers(a, b, limit=3)
        assert len(differences) == 3
        assert differences[0] == "320 tokens in the one, 330 in the other"
        assert "has no id in the one, 320 in the other" in differences[1]

    def test_two_ids_exchanged(self, folder: Path, tmp_path: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["!"], vocabulary["a"] = vocabulary["a"], vocabulary["!"]
        changed = shutil.copytree(folder, tmp_path / "changed")
        (changed / "tokenizer.json").write_text(json.dumps(content))
        differences = compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed))
        assert any(d.startswith("token '!' has id 3 in the one, ") for d in differences)

    def test_another_normalizer(self, folder: Path, tmp_path: Path) -> None:
        changed = shutil.copytree(folder, tmp_path / "changed")
        backend = Tokenizer.from_file(str(changed / "tokenizer.json"))
        backend.normalizer = normalizers.Lowercase()
        backend.save(str(changed / "tokenizer.json"))
        a, b = load_tokenizer(folder), load_tokenizer(changed)
        assert "normalizer differs" in compare_tokenizers(a, b)
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)

    def test_merges_count(self, folder: Path, tmp_path: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        merges = content["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
        changed = shutil.copytree(folder, tmp_path / "changed")
        (changed / "tokenizer.json").write_text(json.dumps(content))
        assert compare_tokenizers(load_tokenizer(folder), load_tokenizer(changed)) == ["model.merges differs"]

    def test_chat_templates(self, tmp_path: Path) -> None:
        tokenizers = []
        for number, template in enumerate(("{{ messages }}", "{{ messages }} ", None)):
            where = tmp_path / str(number)
            where.mkdir()
            save_tokenizer(where, chat_template=template)
            tokenizers.append(load_tokenizer(where))
        assert len({chat_template_fingerprint(t) for t in tokenizers}) == 3
        assert len({tokenizer_fingerprint(t) for t in tokenizers}) == 1

    def test_without_a_backend_the_vocabulary_counts(self) -> None:
        class Plain:
            def __init__(self, vocabulary: dict[str, int]) -> None:
                self.vocabulary = vocabulary

            def get_vocab(self) -> dict[str, int]:
                return self.vocabulary

        a, b = Plain({"a": 0, "b": 1}), Plain({"b": 0, "a": 1})
        assert compare_tokenizers(a, Plain({"b": 1, "a": 0})) == []
        assert compare_tokenizers(a, b)[0] == "token 'a' has id 0 in the one, 1 in the other"
        assert tokenizer_fingerprint(a) != tokenizer_fingerprint(b)


@pytest.mark.slow
class TestRealTeacher:
    def test_capital_of_france(self, real_teacher: Path) -> None:
        import mlx_lm

        loaded = load_model(real_teacher)
        prompt = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
        )
        answer = mlx_lm.generate(loaded.model, loaded.tokenizer, prompt=prompt, max_tokens=24)
        assert "Paris" in answer
        plain = mlx_lm.generate(
            loaded.model, loaded.tokenizer, prompt="The capital of France is", max_tokens=8
        )
        assert "Paris" in plain

    def test_perplexity_on_the_python_documentation(self, real_teacher: Path) -> None:
        """The first 4,096 tokens of the sorted topics, in sequences of 512: 14.74 in float32.

        Half precision moves it by half a percent, a wrong rope base by ten percent (both measured on the first
        sequence), a wrong order of the rows of q and k to the hundreds. Hence 3 percent to either side.
        """
        from pydoc_data.topics import topics

        loaded = load_model(real_teacher)
        ids = loaded.tokenizer.encode("".join(topics[key] for key in sorted(topics)))[:4096]
        token_ids = mx.array(np.array(ids, np.int32).reshape(8, 512))
        total = 0.0
        for row in token_ids:
            hidden = loaded.hidden(row[None]).final[0, :-1]
            losses = nn.losses.cross_entropy(loaded.logits(hidden), row[1:])
            total += float(losses.sum())
        assert 14.3 < float(np.exp(total / (8 * 511))) < 15.2

    def test_packed_documents(self, real_teacher: Path) -> None:
        loaded = load_model(real_teacher)
        assert loaded.head is not None
        assert (loaded.head.path, loaded.notes) == ("model.embed_tokens", ())
        texts = ("The capital of France is Paris.", "A list comprehension consists of brackets.")
        parts = [loaded.tokenizer.encode(text) for text in texts]
        documents = np.repeat([0, 1], [len(part) for part in parts])[None]
        packed = array(loaded.full(mx.array([parts[0] + parts[1]]), documents))[0]
        alone = np.concatenate([array(loaded.model(mx.array([part])))[0] for part in parts])
        np.testing.assert_allclose(packed, alone, atol=1e-3)

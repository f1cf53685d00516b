"""Loading, saving and fingerprints of models, every spoiled folder, and the real teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from pmetal_distill.device import on_cpu
from pmetal_distill.models import (
    cache_home,
    compare_tokenizers,
    load_model,
    model_fingerprint,
    save_model,
    wrap_model,
)
from schemas.errors import ModelError, UsageError
from tests.tiny import build_tiny_model, random_model, tiny_config
from tests.tiny_gguf import build_tiny_gguf
from tests.zoo import array, some_tokens


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
        if not on_cpu():
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
        """The first 1,024 tokens of the sorted topics, in sequences of 512: 14.23 in float32.

        Half precision moves it by half a percent, a wrong rope base by ten percent (both on the first
        sequence), a wrong order of the rows of q and k to the hundreds. Hence 3 percent to either side.
        """
        from pydoc_data.topics import topics

        loaded = load_model(real_teacher)
        ids = loaded.tokenizer.encode("".join(topics[key] for key in sorted(topics)))[:1024]
        token_ids = mx.array(np.array(ids, np.int32).reshape(2, 512))
        total = 0.0
        for row in token_ids:
            hidden = loaded.hidden(row[None]).final[0, :-1]
            losses = nn.losses.cross_entropy(loaded.logits(hidden), row[1:])
            total += float(losses.sum())
        assert 13.8 < float(np.exp(total / (2 * 511))) < 14.66

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

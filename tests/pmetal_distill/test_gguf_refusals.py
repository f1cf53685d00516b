"""GGUF files that must be refused: what cannot be converted, and damage of every kind."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmetal_distill.gguf import convert_gguf
from schemas.errors import ModelError, PmetalError
from tests.tiny_gguf import Parts, build_origin, build_tiny_gguf, gguf_parts, write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_origin(tmp_path_factory.mktemp("origin") / "model")


@pytest.fixture(scope="module")
def sound(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file, matrices as Q8_0."""
    return build_tiny_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", folder, kind="Q8_0").read_bytes()


@pytest.fixture
def parts(folder: Path) -> Parts:
    """Metadata and tensors of a sound file, to be spoiled."""
    return gguf_parts(folder)


def refused(path: Path, *words: str) -> None:
    """The conversion gives a ModelError with `words` that begins with the file's name, and leaves nothing."""
    before = set(path.parent.iterdir())
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, path.parent / "out")
    message = str(caught.value)
    assert message.startswith(str(path))
    assert all(word in message for word in words), message
    assert set(path.parent.iterdir()) == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("general.architecture", "gemma3", ["architecture", "'gemma3'"]),
            ("general.architecture", None, ["architecture", "None"]),
            ("tokenizer.ggml.model", "llama", ["tokenizer", "'llama'"]),
            ("tokenizer.ggml.pre", "tekken", ["pre-tokenizer 'tekken'", "smollm"]),
            ("tokenizer.ggml.pre", None, ["pre-tokenizer None"]),
            ("tokenizer.ggml.merges", ["x y"], ["merge 0", "'x y'"]),
            ("tokenizer.ggml.tokens", ["a", "a"], ["token_type", "2"]),
            ("tokenizer.ggml.eos_token_id", 4000, ["eos_token_id", "4000"]),
            ("tokenizer.ggml.add_eos_token", True, ["add_eos_token"]),
            ("llama.expert_count", 8, ["mixture of experts"]),
            ("llama.rope.scaling.type", "yarn", ["'yarn'"]),
            ("llama.rope.dimension_count", 8, ["rope.dimension_count", "16"]),
            ("llama.attention.head_count", 0, ["attention.head_count", "0"]),
            ("llama.attention.head_count_kv", 3, ["4 heads", "3 key heads"]),
            ("llama.attention.causal", False, ["causal"]),
            ("llama.logit_scale", 2.0, ["logit_scale"]),
            ("llama.attention.layer_norm_rms_epsilon", math.nan, ["layer_norm_rms_epsilon", "nan"]),
            ("llama.feed_forward_length", [4, 4], ["feed_forward_length"]),
            ("llama.block_count", 4_000_000_000, ["blk.2.attn_norm.weight", "missing"]),
            ("llama.block_count", 1, ["blk.1.", "no place"]),
            ("llama.embedding_length", 63, ["embedding_length"]),
            ("general.alignment", 33, ["general.alignment", "33"]),
        ],
    )
    def test_metadata(self, parts: Parts, key: str, value: Any, words: list[str], tmp_path: Path) -> None:
        metadata, tensors = parts
        changed = {name: v for name, v in (metadata | {key: value}).items() if v is not None}
        refused(write_gguf(tmp_path / "m.gguf", changed, tensors), *words)

    @pytest.mark.parametrize(
        ("number", "name"), [(12, "Q4_K"), (14, "Q6_K"), (30, "BF16"), (20, "IQ4_NL"), (99, "99")]
    )
    def test_tensor_types_by_name(self, parts: Parts, number: int, name: str, tmp_path: Path) -> None:
        metadata, tensors = parts
        tensors["blk.1.ffn_up.weight"] = (number, tensors["blk.1.ffn_up.weight"][1])
        refused(write_gguf(tmp_path / "m.gguf", metadata, tensors), "blk.1.ffn_up.weight", name, "Q8_0")

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda t: t.pop("blk.1.attn_k.weight"), ["blk.1.attn_k.weight", "missing"]),
            (lambda t: t.pop("token_embd.weight"), ["token_embd.weight", "missing"]),
            (
                lambda t: t.update({"blk.0.ffn_up_exps.weight": ("F32", np.zeros((2, 32)))}),
                ["ffn_up_exps", "no place"],
            ),
            (
                lambda t: t.update({"output_norm.weight": ("F32", np.zeros(63))}),
                ["output_norm.weight", "(64,)", "(63,)"],
            ),
            (
                lambda t: t.update({"output_norm.weight": ("F32", np.full(64, np.nan))}),
                ["output_norm.weight", "NaN"],
            ),
            (
                lambda t: t.update({"output_norm.weight": ("F32", np.zeros((1, 1, 1, 1, 64)))}),
                ["1 to 4 dimensions"],
            ),
            (lambda t: t.update({"x": ("F16", np.zeros((2, 0)))}), ["shape (2, 0)"]),
        ],
    )
    def test_tensors(
        self, parts: Parts, spoil: Callable[[dict[str, Any]], Any], words: list[str], tmp_path: Path
    ) -> None:
        metadata, tensors = parts
        spoil(tensors)
        refused(write_gguf(tmp_path / "m.gguf", metadata, tensors), *words)

    def test_too_many_tokens(self, folder: Path, tmp_path: Path) -> None:
        metadata, tensors = gguf_parts(folder)
        metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "new"]
        metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
        refused(write_gguf(tmp_path / "m.gguf", metadata, tensors), "329 tokens", "328")

    def test_unknown_rope_factors(self, parts: Parts, tmp_path: Path) -> None:
        metadata, tensors = parts
        tensors["rope_freqs.weight"] = ("F32", np.linspace(1, 5, 8))
        refused(write_gguf(tmp_path / "m.gguf", metadata, tensors), "rope_freqs.weight")

    def test_not_a_gguf_file(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_bytes(b"PK\3\4 something else")
        refused(path, "not a GGUF file")
        path.write_bytes(b"")
        refused(path, "not a GGUF file")

    def test_missing_file_and_folder(self, tmp_path: Path) -> None:
        refused(tmp_path / "absent.gguf", "cannot be read")
        refused(tmp_path, "cannot be read")

    @pytest.mark.parametrize(("version", "word"), [(1, "found 1"), (4, "found 4"), (3 << 24, "big-endian")])
    def test_versions(self, folder: Path, version: int, word: str, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        data = bytearray(path.read_bytes())
        data[4:8] = version.to_bytes(4, "little")
        path.write_bytes(data)
        refused(path, word)


class TestDamage:
    def test_truncation_anywhere(self, sound: bytes, tmp_path: Path) -> None:
        path = tmp_path / "cut.gguf"
        cuts = [*range(0, 400, 13), *np.linspace(400, len(sound) - 33, 60).astype(int).tolist()]
        for cut in cuts:
            path.write_bytes(sound[:cut])
            refused(path)

    def test_truncation_is_called_so(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        path.write_bytes(path.read_bytes()[:-1000])
        refused(path, "truncated", "behind the end of the file")

    @pytest.mark.parametrize("offset", [8, 16])
    @pytest.mark.parametrize("count", [2**63, 2**40, 2**17])
    def test_absurd_counts_allocate_nothing(
        self, folder: Path, offset: int, count: int, tmp_path: Path
    ) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        data = bytearray(path.read_bytes())
        data[offset : offset + 8] = count.to_bytes(8, "little")
        path.write_bytes(data)
        tracemalloc.start()
        refused(path, str(count), "more than the file can hold")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000

    def test_absurd_array_and_string_lengths(self, folder: Path, tmp_path: Path) -> None:
        for key, size in (
            ("tokenizer.ggml.tokens", 8),
            ("tokenizer.ggml.token_type", 8),
            ("general.name", 4),
        ):
            path = build_tiny_gguf(tmp_path / "m.gguf", folder)
            data = bytearray(path.read_bytes())
            at = data.index(key.encode()) + len(key) + size
            data[at : at + 8] = (2**62).to_bytes(8, "little")
            path.write_bytes(data)
            refused(path, key, str(2**62))

    def test_overlapping_tensors(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        data = bytearray(path.read_bytes())
        name = b"blk.1.attn_v.weight"
        at = data.index(name) + len(name) + 4 + 16 + 4  # dimensions, shape, type
        data[at : at + 8] = bytes(8)
        path.write_bytes(data)
        refused(path, "overlaps")

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32), st.integers(1, 4))
    def test_flipped_header_bytes_never_crash(
        self, sound: bytes, tmp_path_factory: pytest.TempPathFactory, seed: int, flips: int
    ) -> None:
        where = tmp_path_factory.mktemp("flip")
        data = bytearray(sound)
        generator = np.random.default_rng(seed)
        # Lengths and types rather than the letters of tokens: the first metadata and the tensor table.
        table = data.index(b"token_embd.weight")
        places = [*range(1200), *range(table, table + 1200)]
        for place in generator.choice(places, flips):
            data[place] ^= 1 << int(generator.integers(8))
        (where / "m.gguf").write_bytes(data)
        try:
            out = convert_gguf(where / "m.gguf", where / "out")
        except PmetalError:
            assert {path.name for path in where.iterdir()} == {"m.gguf"}
        else:
            assert (out / "model.safetensors").is_file()

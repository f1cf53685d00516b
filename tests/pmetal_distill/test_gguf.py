"""GGUF conversion: values against a per-element reference, and every kind of file that must be refused."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pmetal_distill.gguf import RECORD, convert_gguf
from pmetal_distill.modelling.gguf_format import read_gguf
from pmetal_distill.modelling.gguf_tokenizer import write_tokenizer
from schemas.errors import ModelError, PmetalError, UsageError
from tests.tiny import build_tiny_model
from tests.tiny_gguf import build_tiny_gguf, gguf_parts, quantize, write_gguf

QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")
Parts = tuple[dict[str, Any], dict[str, tuple[str | int, np.ndarray]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Width 64, so that every matrix has whole blocks of 32; padded embedding; untied head."""
    path = tmp_path_factory.mktemp("origin") / "model"
    return build_tiny_model(path, hidden_size=64, num_layers=2, vocab_size=328, tokenizer_size=320, tie=False)


@pytest.fixture(scope="module")
def sound(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file, matrices as Q8_0."""
    return build_tiny_gguf(tmp_path_factory.mktemp("sound") / "m.gguf", folder, kind="Q8_0").read_bytes()


@pytest.fixture
def parts(folder: Path) -> Parts:
    """Metadata and tensors of a sound file, to be spoiled."""
    return gguf_parts(folder)


def decode_reference(data: bytes, kind: str) -> list[float]:
    """Element by element, as ggml defines the types."""
    if kind in ("F32", "F16"):
        return np.frombuffer(data, "<f4" if kind == "F32" else "<f2").astype(np.float64).tolist()
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    values = []
    for start in range(0, len(data), sizes[kind]):
        block = data[start : start + sizes[kind]]
        scale = float(np.frombuffer(block[:2], "<f2")[0])
        for index in range(32):
            if kind == "Q8_0":
                values.append(scale * int(np.int8(np.uint8(block[2 + index]))))
                continue
            skip = 2 if kind == "Q4_0" else 4
            byte = block[skip + index % 16]
            number = byte & 15 if index < 16 else byte >> 4
            low = float(np.frombuffer(block[2:4], "<f2")[0]) if kind == "Q4_1" else -8 * scale
            values.append(scale * number + low)
    return values


class TestValues:
    def test_the_folder_comes_back_bit_for_bit(self, folder: Path, tmp_path: Path) -> None:
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        expected, found = (load_file(path / "model.safetensors") for path in (folder, out))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)

    def test_the_configuration_comes_back(self, folder: Path, tmp_path: Path) -> None:
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        expected, found = (json.loads((path / "config.json").read_text()) for path in (folder, out))
        assert {key: found[key] for key in expected} == expected

    @pytest.mark.parametrize("kind", ["F32", "F16", *QUANTIZED])
    def test_types_decode_as_defined(self, kind: str, tmp_path: Path) -> None:
        values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
        path = write_gguf(tmp_path / "m.gguf", {}, {"x": (kind, values)})
        found = read_gguf(path).read("x")
        assert found.dtype == np.float32
        reference = np.array(decode_reference(quantize(values, kind), kind)).reshape(6, 64)
        np.testing.assert_allclose(found, reference, rtol=1e-6, atol=1e-7)
        bound = {"F32": 0, "F16": 1e-3, "Q8_0": 0.02, "Q4_0": 0.3, "Q4_1": 0.25}[kind]
        assert np.abs(found - values).max() <= bound

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.sampled_from(QUANTIZED), st.binary(min_size=34 * 20, max_size=34 * 20))
    def test_any_block_decodes_as_defined(
        self, tmp_path_factory: pytest.TempPathFactory, kind: str, data: bytes
    ) -> None:
        size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
        blocks = bytearray(data[: len(data) // size * size])
        for start in range(0, len(blocks), size):  # scales that are not NaN or infinite
            for high in (1, 3) if kind == "Q4_1" else (1,):
                blocks[start + high] &= 0b10111111
        path = tmp_path_factory.mktemp("block") / "m.gguf"
        write_gguf(path, {}, {"x": (kind, np.zeros((len(blocks) // size, 32)))})
        header = path.read_bytes()[: -math.ceil(len(blocks) / 32) * 32]
        path.write_bytes(header + bytes(blocks) + b"\0" * (-len(blocks) % 32))
        np.testing.assert_allclose(
            read_gguf(path).read("x").ravel(), decode_reference(bytes(blocks), kind), rtol=1e-6, atol=1e-9
        )

    @pytest.mark.parametrize("kind", QUANTIZED)
    def test_mlx_reads_the_same(self, kind: str, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder, kind=kind)
        tensors: Any = mx.load(str(path))
        name = "blk.1.ffn_down"
        packed, scales = tensors[f"{name}.weight"], tensors[f"{name}.scales"]
        theirs = mx.dequantize(
            packed,
            scales,
            tensors[f"{name}.biases"],
            group_size=32,
            bits=packed.shape[1] // scales.shape[1],
        )
        ours = read_gguf(path).read(f"{name}.weight")
        np.testing.assert_allclose(
            ours, np.array(theirs.astype(mx.float32)), rtol=0, atol=2e-3 * np.abs(ours).max()
        )

    def test_float16_rounds_once(self, folder: Path, tmp_path: Path) -> None:
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out", dtype="float16")
        expected = load_file(folder / "model.safetensors")
        for name, values in load_file(out / "model.safetensors").items():
            np.testing.assert_array_equal(values, expected[name].astype(np.float16), err_msg=name)

    def test_biases_are_unpermuted_too(self, tmp_path: Path) -> None:
        origin = build_tiny_model(tmp_path / "origin", num_layers=1, attention_bias=True, mlp_bias=True)
        weights = load_file(origin / "model.safetensors")
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", origin), tmp_path / "out")
        found = load_file(out / "model.safetensors")
        assert "model.layers.0.self_attn.q_proj.bias" in weights
        assert found.keys() == weights.keys()
        for name, values in weights.items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


class TestRope:
    def test_linear_scaling(self, folder: Path, tmp_path: Path) -> None:
        keys: dict[str, Any] = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder, **keys), tmp_path / "out")
        scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
        assert (scaling["type"], scaling["factor"]) == ("linear", 4.0)

    @pytest.mark.parametrize("factor", [8.0, 32.0])
    def test_llama3_factors_are_recognised(self, parts: Parts, factor: float, tmp_path: Path) -> None:
        metadata, tensors = parts
        metadata["llama.rope.freq_base"] = 500000.0
        tensors["rope_freqs.weight"] = ("F32", np.array(llama3_reference(16, 500000.0, factor)))
        out = convert_gguf(write_gguf(tmp_path / "m.gguf", metadata, tensors), tmp_path / "out")
        scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
        assert (scaling["rope_type"], scaling["factor"]) == ("llama3", factor)

    def test_other_factors_are_refused(self, parts: Parts, tmp_path: Path) -> None:
        metadata, tensors = parts
        tensors["rope_freqs.weight"] = ("F32", np.linspace(1, 5, 8))
        refused(write_gguf(tmp_path / "m.gguf", metadata, tensors), "rope_freqs.weight")


def llama3_reference(head_dim: int, theta: float, factor: float) -> list[float]:
    """Case by case, as the Llama 3.1 release states it (low 1, high 4, original context 8192)."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (index / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


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


class TestOutput:
    def test_a_second_call_reuses_the_first(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        first = convert_gguf(path, tmp_path / "out")
        before = (first / "model.safetensors").stat().st_mtime_ns
        assert convert_gguf(path, tmp_path / "out") == first
        assert (first / "model.safetensors").stat().st_mtime_ns == before

    def test_another_file_or_type_is_not_mixed_in(self, folder: Path, tmp_path: Path) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        convert_gguf(path, tmp_path / "out")
        with pytest.raises(UsageError, match="must not exist yet"):
            convert_gguf(path, tmp_path / "out", dtype="float16")
        other = build_tiny_gguf(tmp_path / "other.gguf", folder, kind="F16")
        with pytest.raises(UsageError, match="must not exist yet"):
            convert_gguf(other, tmp_path / "out")

    def test_a_folder_in_use_stays_as_it_is(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(UsageError, match="must not exist yet"):
            convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]

    def test_an_empty_folder_is_taken(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        out = convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        assert (out / RECORD).is_file()

    def test_another_process_may_be_faster(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = build_tiny_gguf(tmp_path / "m.gguf", folder)
        theirs = convert_gguf(path, tmp_path / "theirs")

        def publish_theirs(*args: Any, **kwargs: Any) -> int:
            if theirs.exists():
                theirs.rename(tmp_path / "out")
            return write_tokenizer(*args, **kwargs)

        monkeypatch.setattr("pmetal_distill.gguf.write_tokenizer", publish_theirs)
        assert convert_gguf(path, tmp_path / "out") == tmp_path / "out"
        assert {entry.name for entry in tmp_path.iterdir()} == {"m.gguf", "out"}

    def test_unknown_dtype(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="bfloat16"):
            convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out", dtype="bfloat16")

    def test_no_room(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(UsageError, match="are free"):
            convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()

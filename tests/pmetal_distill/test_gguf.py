"""GGUF conversion: values against a per-element reference, and what is left on the disk."""

import json
import math
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
from schemas.errors import UsageError
from tests.tiny import build_tiny_model
from tests.tiny_gguf import Parts, build_origin, build_tiny_gguf, gguf_parts, quantize, write_gguf

QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_origin(tmp_path_factory.mktemp("origin") / "model")


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
        with pytest.raises(UsageError, match="float8"):
            convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out", dtype="float8")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_the_nearest(self, folder: Path, tmp_path: Path, dtype: str) -> None:
        file = build_tiny_gguf(tmp_path / "m.gguf", folder)
        exact, half = (convert_gguf(file, tmp_path / name, dtype=name) for name in ("float32", dtype))
        whole, rounded = (mx.load(str(place / "model.safetensors")) for place in (exact, half))
        assert whole.keys() == rounded.keys()  # type: ignore[union-attr]
        for name, array in whole.items():  # type: ignore[union-attr]
            assert mx.array_equal(rounded[name], array.astype(getattr(mx, dtype))), name  # type: ignore[index]

    def test_no_room(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
        with pytest.raises(UsageError, match="are free"):
            convert_gguf(build_tiny_gguf(tmp_path / "m.gguf", folder), tmp_path / "out")
        assert not (tmp_path / "out").exists()

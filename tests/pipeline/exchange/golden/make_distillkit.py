"""Makes the DistillKit files beside it, with DistillKit's own compressor. Run it where that is importable.

    python -m tests.pipeline.exchange.golden.make_distillkit logits OUT.npz    needs MLX
    python make_distillkit.py encode OUT.npz                                   needs distillkit and torch

The logits are those of the tiny teacher of the tests (a pure function of its seed), the expected values what
DistillKit's `decompress_to_sparse` gives back. Last run with DistillKit's compression modules as of
distillkit/compression/monotonic_logprobs.py with `normalize_t`, torch 2.13.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TEXTS = ("A teacher writes what it knows about every token.", "The fox jumps over the lazy dog.")
CONFIGS = {
    "exact": {"k": 16, "exact_k": 16, "delta_encoding": False, "residual_bins": []},
    "recommended": {
        "k": 32,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "delta_encoding": False,
        "residual_bins": [],
    },
    "delta": {
        "k": 32,
        "exact_k": 8,
        "polynomial_terms": [0, 1, 2],
        "normalize_t": True,
        "delta_encoding": True,
        "residual_bins": [],
    },
    "bins": {
        "k": 24,
        "exact_k": 3,
        "exact_dtype": "float16",
        "term_dtype": "bfloat16",
        "polynomial_terms": [0, 1],
        "delta_encoding": False,
        "error_diffusion": True,
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 7, "num_elements": 9},
            {"scale_dtype": "bfloat16", "element_bits": 3, "num_elements": 5},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 4},
        ],
    },
    "legacy": {"k": 32, "exact_k": 8, "polynomial_degree": 3, "with_sqrt_term": True},
}


def write_logits(out: Path) -> None:
    """Token ids and logits of the tiny teacher."""
    import tempfile

    import mlx.core as mx

    from pmetal_distill.models import load_model
    from tests.tiny import build_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        teacher = load_model(build_tiny_model(Path(folder) / "teacher"))
        arrays = {}
        for number, text in enumerate(TEXTS):
            ids = [*teacher.tokenizer.encode(text), teacher.tokenizer.eos_token_id]
            arrays[f"ids{number}"] = np.array(ids, np.int32)
            arrays[f"logits{number}"] = np.array(teacher.full(mx.array([ids]))[0].astype(mx.float32))
    np.savez(out, **arrays)


def encode(source: Path) -> None:
    """Parquet files as DistillKit's sampler writes them, their configurations, and the expected values."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    import yaml
    from distillkit.compression.compressor import LogprobCompressor
    from distillkit.compression.config import DistributionQuantizationConfig, LegacyLogitCompressionConfig

    arrays, expected = np.load(source), {}
    for name, values in CONFIGS.items():
        if name == "legacy":
            config = LegacyLogitCompressionConfig(vocab_size=320, **values)
            compressor, k = LogprobCompressor(legacy_config=config), config.k
        else:
            config = DistributionQuantizationConfig(d=320, **values)
            compressor, k = LogprobCompressor(config=config), config.k
        rows = []
        for number in range(len(TEXTS)):
            logits = torch.tensor(arrays[f"logits{number}"])[:-1]
            values_in = logits - logits.mean(-1, keepdim=True) if name == "legacy" else logits.log_softmax(-1)
            top, indices = values_in.topk(k, dim=-1)
            packed = compressor.compress_from_sparse(indices[None], top[None])
            ids, logprobs = compressor.decompress_to_sparse(packed)
            expected[f"{name}_ids{number}"] = ids[0].numpy().astype(np.int16)
            expected[f"{name}_logprobs{number}"] = logprobs[0].float().numpy()
            lists = {key: value[0].tolist() for key, value in packed.items()}
            rows.append({"input_ids": arrays[f"ids{number}"].tolist(), **lists})
        inner = {"exact_values": pa.float32(), "coeffs": pa.float32(), "packed_indices": pa.uint64()}
        fields = [pa.field("input_ids", pa.list_(pa.uint64()))]
        fields += [
            pa.field(key, pa.list_(pa.list_(inner.get(key, pa.uint8()))))
            for key in rows[0]
            if key != "input_ids"
        ]
        folder = HERE / "distillkit" / name
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(fields)), folder / "data_0.parquet")
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    np.savez_compressed(HERE / "distillkit" / "expected.npz", **expected)


if __name__ == "__main__":
    command, path = sys.argv[1:]
    write_logits(Path(path)) if command == "logits" else encode(Path(path))

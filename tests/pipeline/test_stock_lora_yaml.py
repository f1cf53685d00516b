"""A file as mlx-lm ships it for `mlx_lm.lora -c` trains here as it stands; what has no use is said once."""

from pathlib import Path

import pytest

from tests.pipeline.conftest import Cli

# mlx_lm/examples/lora_config.yaml without its comments; sizes are those of a test.
STOCK = """
model: "{model}"
train: true
fine_tune_type: {kind}
optimizer: adamw
data: "mlx-community/WikiSQL"
seed: 0
num_layers: 16
batch_size: 2
iters: 3
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "{out}"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_taken_as_it_is(
    cli: Cli, bucket_cache: Path, tiny_student: Path, tmp_path: Path, kind: str
) -> None:
    file, out = tmp_path / "lora_config.yaml", tmp_path / "adapters"
    file.write_text(STOCK.format(model=tiny_student, out=out, kind=kind))
    got = cli("train", "-c", file, "--cache", bucket_cache)
    assert got.code == 0, got.err
    (said,) = [line for line in got.err.splitlines() if "left out" in line]
    assert said.endswith(
        "lora_config.yaml: left out train (this command trains); test, test_batches ('pmetal-pipeline eval' "
        "tests); data, max_seq_len (the cache decides)"
    )
    assert got.err.count("num_layers: 16 wanted, 2 there: all are trained") == 1
    if kind == "lora":
        from mlx_lm import load

        load(str(tiny_student), adapter_path=str(out))  # which refuses more layers than there are


def test_data_that_is_typed_beside_a_cache_is_an_error(cli: Cli, bucket_cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: m\nadapter_path: {tmp_path / 'out'}\n")
    got = cli("train", "-c", file, "--cache", bucket_cache, "--data", "text.jsonl")
    assert got.code == 2
    assert "teacher, data: must be given together" in got.err

"""The estimate of a run's memory against MLX's peak: random Llamas, all ways of fine-tuning. About a minute.

    python benchmarks/memory.py                           sizes for two CPU cores
    python benchmarks/memory.py --width 1024 --layers 12 --vocab 151936 --length 1024 --dtype bfloat16

Peaks are those of two steps after a first one, without what NumPy holds (the head's chunks on the CPU).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pmetal_distill  # noqa: F401  (BLAS before MLX)

import mlx.core as mx  # isort: skip

from benchmarks.letters import write_letters
from benchmarks.pipeline_gpu import write_model
from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.settings import CacheSettings, LoraParameters, TrainSettings
from pipeline.training.checkpoints import Checkpoints
from pipeline.training.memory import Memory, estimate
from pipeline.training.run import prepare_loop

QUIET = Console(quiet=True)
ADAPTED = {"lora_parameters": LoraParameters(rank=8)}
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, recomputed": {"grad_checkpoint": True},
    "full, accumulated": {"grad_accumulation_steps": 2},
    "full, sgd": {"optimizer": "sgd"},
    "full, adafactor": {"optimizer": "adafactor"},
    "full, muon": {"optimizer": "muon"},
    "last quarter": {},
    "lora": {"fine_tune_type": "lora", **ADAPTED},
    "lora, recomputed": {"fine_tune_type": "lora", "grad_checkpoint": True, **ADAPTED},
    "dora": {"fine_tune_type": "dora", **ADAPTED},
}


def measure(settings: TrainSettings) -> tuple[Memory, int]:
    """The estimate, and the peak."""
    mx.clear_cache()
    before = mx.get_active_memory()
    loop = prepare_loop(settings, Checkpoints(settings.out, 1), None, QUIET)
    with loop.source.batches(batch_size=settings.batch_size, seed=0, prefetch=0) as batches:
        loop.distiller.step(next(batches))
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(2 * settings.grad_accumulation_steps):
            loop.distiller.step(next(batches))
    return estimate(settings, loop.source, loop.distiller), mx.get_peak_memory() - before


def make_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A student, text, and a cache of it from a small teacher."""
    sizes = {"student": (options.layers, options.width), "teacher": (2, 64)}
    for seed, (name, (layers, width)) in enumerate(sizes.items()):
        write_model(folder / name, vocab=options.vocab, layers=layers, width=width, seed=seed)
        if options.dtype == "float32":
            weights = mx.load(str(folder / name / "model.safetensors"))
            wide = {key: array.astype(mx.float32) for key, array in weights.items()}
            mx.save_safetensors(str(folder / name / "model.safetensors"), wide, metadata={"format": "mlx"})
    write_letters(folder / "text.jsonl", documents=4 * options.batch, characters=2 * options.length)
    settings = CacheSettings(
        teacher=str(folder / "teacher"),
        data=str(folder / "text.jsonl"),
        out=folder / "cache",
        max_seq_len=options.length,
        tail="bucket",
    )
    run_cache(settings, QUIET)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    print(f"MLX {mx.__version__}, {mx.default_device()}, {vars(options)}")
    print(
        f"{'':20}{'peak MB':>9}{'estimate':>10}{'ratio':>7}  weights, gradients, optimizer, activations, head"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, options)
        for form, changes in FORMS.items():
            layers = {"num_layers": options.layers // 4} if form == "last quarter" else {}
            settings = TrainSettings(
                student=str(folder / "student"),
                cache=folder / "cache",
                out=folder / "run",
                batch_size=options.batch,
                memory_limit_gb=1e6,
                **changes,
                **layers,
            )
            guess, peak = measure(settings)
            parts = (guess.weights, guess.gradients, guess.optimizer, guess.activations, guess.head)
            shown = " ".join(f"{part / 1e6:.0f}" for part in parts)
            ratio = guess.total / peak
            print(f"{form:20}{peak / 1e6:9.0f}{guess.total / 1e6:10.0f}{ratio:7.2f}  {shown}", flush=True)
            shutil.rmtree(settings.out, ignore_errors=True)


if __name__ == "__main__":
    main()

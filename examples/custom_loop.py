"""A training loop of one's own: gradient accumulation, a log of its own, and exact resuming.

    python examples/custom_loop.py --cache CACHE --student MODEL --out FOLDER --updates 100

Stop it at any time and run it again, also with more updates: it goes on from its last checkpoint as if it had
never been stopped, bit by bit on the CPU. FOLDER then holds log.csv, checkpoints/ and model-100/.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.optimizers as optim

from pmetal_distill import DistillConfig, Distiller, LogitCache, LossParts, load_model, save_model
from pmetal_distill.checkpoint import TrainingState, list_states, remove_states, write_state

BATCH_SIZE, ACCUMULATED, SAVE_EVERY = 2, 4, 5
FIELDS = ("update", "temperature", "loss", "kl", "cross_entropy")


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains until there were `--updates` of them."""
    options = read_options(arguments)
    checkpoints, log = options.out / "checkpoints", options.out / "log.csv"
    options.out.mkdir(parents=True, exist_ok=True)

    cache = LogitCache(options.cache)
    config = DistillConfig(temperature=2.0, alpha=0.5, accumulation_steps=ACCUMULATED, max_grad_norm=1.0)
    optimizer = optim.AdamW(learning_rate=options.learning_rate)
    distiller = Distiller(cache, load_model(options.student), config, optimizer=optimizer)

    reader, lines = None, []
    if saved := list_states(checkpoints):
        state = saved[-1].read()  # checks its SHA-256
        distiller.state = state
        reader, lines = state.record["reader"], state.record["lines"]
        print(f"going on behind update {distiller.updates}")

    with cache.batches(batch_size=BATCH_SIZE, seed=0, state=reader) as batches:
        while distiller.updates < options.updates:
            # An update applies the mean gradient of ACCUMULATED batches.
            temperature = config.temperature_at(distiller.updates)
            parts = [distiller.step(next(batches)) for _ in range(ACCUMULATED)]
            lines.append(line_of(distiller.updates, temperature, parts))
            print(*(f"{name} {value:g}" for name, value in zip(FIELDS, lines[-1], strict=True)))
            if distiller.updates % SAVE_EVERY == 0 or distiller.updates == options.updates:
                save(checkpoints, distiller, {"reader": batches.get_state(), "lines": lines})
                write_log(log, lines)
    model = options.out / f"model-{distiller.updates}"
    if not model.exists():
        save_model(distiller.student, model)
    print(f"mlx_lm.generate --model {model}")


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(arguments)


def line_of(update: int, temperature: float, parts: Sequence[LossParts]) -> list[float]:
    """A line of the log: means over the batches of an update."""
    losses = zip(*((part.total.item(), part.soft.item(), part.hard.item()) for part in parts), strict=True)
    return [update, temperature, *(sum(values) / len(values) for values in losses)]


def save(folder: Path, distiller: Distiller, own: dict[str, Any]) -> None:
    """Writes all that the next run needs, whole or not at all; then removes older checkpoints but one."""
    state = distiller.state
    write_state(folder, distiller.updates, TrainingState(state.arrays, {**state.record, **own}))
    remove_states(list_states(folder)[:-2])


def write_log(file: Path, lines: Sequence[Sequence[float]]) -> None:
    """The log as the checkpoint has it, so that no line is missing or there twice."""
    with file.open("w", newline="") as handle:
        csv.writer(handle).writerows([FIELDS, *lines])


if __name__ == "__main__":
    main()

"""Training in several processes is training in one: losses and weights, with every kind of loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_ranks

PROGRAM = """
import json, sys
import mlx.core as mx, mlx.optimizers as optim, numpy as np
from mlx.utils import tree_flatten
from pmetal_distill import DistillConfig, Distiller, HiddenStateLoss, load_model
from pmetal_distill.parallel import World
from pmetal_distill.teaching import TextBatch

teacher, student, out = sys.argv[1:4]
world = World.launched()
config = DistillConfig(
    alpha=0.7, hidden_loss=HiddenStateLoss.COSINE, hidden_layers=[1], accumulation_steps=2, max_grad_norm=0.5
)
model = load_model(student)
distiller = Distiller(
    load_model(teacher), model, config, optimizer=optim.SGD(learning_rate=0.05), world=world
)
rng = np.random.default_rng(3)
totals = []
for _ in range(6):
    whole = TextBatch.of(rng.integers(5, 200, (5, 24)))
    mask = whole.loss_mask & (rng.random((5, 24)) < rng.random((5, 1)))  # rows of very different weight
    mine = slice(world.rank, None, world.size)
    batch = TextBatch(whole.token_ids[mine], whole.documents[mine], mask[mine], whole.labels[mine])
    parts = distiller.step(batch)
    totals.append([float(part.item()) for part in parts])
weights = {name: np.array(w) for name, w in tree_flatten(model.model.parameters())}
np.savez(f"{out}/{world.rank}of{world.size}.npz", **weights)
print(json.dumps(totals))
"""


@pytest.fixture
def trained(tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> Any:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run(size: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        ends = run_ranks([program, tiny_teacher, tiny_student, tmp_path], size, tmp_path)
        assert all(end.code == 0 for end in ends), ends[0].err
        return [
            (np.array(json.loads(end.out)), dict(np.load(tmp_path / f"{rank}of{size}.npz")))
            for rank, end in enumerate(ends)
        ]

    return run


def test_two_and_three_processes_train_as_one_does(trained: Any) -> None:
    [(one, weights)] = trained(1)
    for size in (2, 3):
        results = trained(size)
        for losses, others in results:
            np.testing.assert_allclose(losses, one, rtol=1e-5)
            for name, weight in weights.items():
                np.testing.assert_allclose(others[name], weight, atol=2e-6, err_msg=name)
        for name, weight in results[0][1].items():  # exactly equal among themselves
            np.testing.assert_array_equal(results[1][1][name], weight)

"""Hidden states kept by their PCA coordinates, from the command line to the reader."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli

WIDTH, LAYERS = 32, (0, 1, 2, 3)
WORDS = ("--max-seq-len", 64, "--batch-size", 4, "--sequences-per-shard", 8, "--calibration-tokens", 900)


def true_states(teacher: LoadedModel, cache: LogitCache) -> dict[int, np.ndarray]:
    """Every trained state of the teacher by layer, [n, d]."""
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in LAYERS}
    for number in range(cache.num_sequences):
        row = cache.sequence(number)
        states = teacher.hidden(mx.array(row.token_ids[None]), documents=row.documents[None], layers=LAYERS)
        for layer in LAYERS:
            found[layer].append(np.array(states.layers[layer][0])[row.loss_mask])
    return {layer: np.concatenate(parts).astype(np.float64) for layer, parts in found.items()}


def stored_states(cache: LogitCache) -> dict[int, np.ndarray]:
    rows = [cache.sequence(number) for number in range(cache.num_sequences)]
    return {layer: np.concatenate([row.hidden[layer][row.loss_mask] for row in rows]) for layer in LAYERS}


def least_error(states: np.ndarray, rank: int) -> float:
    """Root of the mean squared error of the best approximation of this rank."""
    values = np.linalg.svd(states - states.mean(axis=0), compute_uv=False)
    return float(np.sqrt(np.square(values[rank:]).sum() / states.size))


@pytest.mark.parametrize("tail", ["bucket", "sketch"])
def test_the_states_come_back_as_close_as_the_rank_allows(
    cli: Cli, tiny_teacher: Path, text_file: Path, tmp_path: Path, tail: str
) -> None:
    teacher = load_model(tiny_teacher)
    words = ("--teacher", tiny_teacher, "--data", text_file, "--hidden-layers", "all", "--tail", tail)
    sizes = {}
    for rank in (6, WIDTH):
        out = tmp_path / str(rank)
        got = cli("cache", *words, *WORDS, "--sketch-rank", 8, "--hidden-rank", rank, "--out", out, "--json")
        assert got.code == 0, got.err
        sizes[rank] = got.json["hidden_bytes_per_token"]
        assert cli("verify", out).code == 0
        cache = LogitCache(out, hidden_layers=LAYERS)
        assert len({record.hidden_basis for record in cache.records}) == 1
        exact, stored = true_states(teacher, cache), stored_states(cache)
        for layer in LAYERS:
            error = float(np.sqrt(np.square(stored[layer] - exact[layer]).mean()))
            spread = float(exact[layer].std())
            assert error < 1.1 * least_error(exact[layer], rank) + 0.01 * spread
            if rank < WIDTH:
                assert error > 0.05 * spread  # the rank is what is lost here
    assert sizes[6] < 0.4 * sizes[WIDTH]


def test_a_resumed_run_gives_the_same_bytes_and_another_sample_is_refused(
    cli: Cli, tiny_teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("--teacher", tiny_teacher, "--data", text_file, "--out", tmp_path / "c", "--tail", "bucket")
    words = (*words, *WORDS, "--hidden-layers", "1,-1", "--hidden-rank", 5)
    assert cli("cache", *words).code == 0
    root = LogitCache(tmp_path / "c").root
    sorted((tmp_path / "c/commits").iterdir())[1].unlink()
    got = cli("cache", *words, "--calibration-tokens", 500, "--resume")
    assert got.code == 1
    assert "codec" in got.err
    assert cli("cache", *words, "--resume").code == 0
    assert LogitCache(tmp_path / "c").root == root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--hidden-rank", 5), "hidden_rank: must be 0 without hidden layers, found 5"),
        (("--hidden-rank", -1, "--hidden-layers", "1"), "hidden_rank: must be at least 0"),
        (("--hidden-rank", 33, "--hidden-layers", "all"), "hidden_rank: must be at most 32, the width"),
    ],
)
def test_ranks_that_do_not_fit(
    cli: Cli, tiny_teacher: Path, text_file: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    got = cli(
        "cache", "--teacher", tiny_teacher, "--data", text_file, "--out", tmp_path / "c", *WORDS, *words
    )
    assert got.code == 2
    assert message in got.err


def test_too_little_text_for_the_rank(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "short.txt"
    data.write_text("The quick brown fox jumps.")
    words = ("--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "c", "--tail", "bucket")
    got = cli("cache", *words, "--hidden-layers", "all", "--hidden-rank", 30)
    assert got.code == 2
    assert "hidden_rank: must be at most the" in got.err

"""Takes one architecture through everything: load, split, pack, cache, train, cut. Costs about a second each.

Every station is the command's own function on a folder of the small model, so what fails here fails a user.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from pipeline.cache import run_cache
from pipeline.console import Console
from pipeline.new_student import NewStudent, make_student
from pipeline.settings import CacheSettings, TrainSettings
from pipeline.training.run import run_train
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.target import TeacherTarget
from schemas.errors import PmetalError
from tests.tiny import SENTENCES, random_model, save_tokenizer
from tests.zoo.configs import VOCABULARY, small_config

QUIET = Console(quiet=True)
LENGTH = 64
NUM_DOCUMENTS = 12
NOT_IN_MLX_LM = "not in mlx-lm"
LARGEST_ERROR = 0.02
"""Nats at the first choices: rounding in the cache is 1/256, leaks and wrong heads are tenths and more."""


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one architecture; a column is what was found, or why it failed.

    Attributes:
        splits: "matrix" for a head that was found, "head" for one that is called, "full call" for neither.
        packs: "batch" or "rows" where documents may share a sequence, else "no".
        exact: largest difference of a cached log-probability of a first choice to the plain call, nats.
        full, lora: "yes", or `NOT_IN_MLX_LM`.
        student: "yes".
    """

    name: str
    loads: str = ""
    splits: str = ""
    packs: str = ""
    exact: str = ""
    full: str = ""
    lora: str = ""
    student: str = ""
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """Columns that failed, and why."""
        return {
            column: found[1:]
            for column in ("loads", "exact", "full", "lora", "student")
            if (found := getattr(self, column)).startswith("!")
        }


def stirred_model(name: str) -> nn.Module:
    """The small model, with small random numbers instead of zeros: RWKV's norm of zeros has no gradient."""
    model = random_model(json.loads(json.dumps(small_config(name))))

    def stir(path: str, tensor: mx.array) -> mx.array:
        if not mx.issubdtype(tensor.dtype, mx.floating) or bool((tensor != 0).any()):
            return tensor
        key = mx.random.key(zlib.crc32(path.encode()))
        return 0.1 * mx.random.normal(tensor.shape, key=key).astype(tensor.dtype)

    model.update(tree_map_with_path(stir, model.parameters()))
    return model


def write_model(name: str, folder: Path) -> Path:
    """The small model of an architecture as a folder that mlx_lm loads."""
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(stirred_model(name).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(small_config(name)))
    save_tokenizer(folder, vocab_size=VOCABULARY)
    return folder


def write_text(folder: Path) -> Path:
    """A few short documents."""
    path = folder / "text.jsonl"
    texts = [SENTENCES[n % len(SENTENCES)][: 20 + 7 * n % 60] for n in range(NUM_DOCUMENTS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def try_architecture(name: str, folder: Path) -> Row:
    """Everything that can be done with it, in an empty folder."""
    row = Row(name)
    try:
        loaded = load_model(write_model(name, folder / "model"))
    except PmetalError as error:
        return replace(row, loads=f"!{error}")
    text = write_text(folder)
    row = replace(
        row, loads="yes", splits=how_it_splits(loaded), packs=loaded.anatomy.packing, notes=loaded.notes
    )
    stations: dict[str, Callable[[], str]] = {
        "exact": lambda: largest_error(loaded, text, folder / "cache"),
        "full": lambda: trained(name, folder, "full"),
        "lora": lambda: trained(name, folder, "lora"),
        "student": lambda: cut(folder),
    }
    for column, station in stations.items():
        row = replace(row, **{column: _outcome(station)})
    return row


def _outcome(station: Callable[[], str]) -> str:
    try:
        return station()
    except PmetalError as error:
        return f"!{error}"
    except Exception as error:  # noqa: BLE001 - a traceback is the worst that a column can hold
        return f"!{type(error).__name__}: {error}"


def how_it_splits(loaded: LoadedModel) -> str:
    """Which of the three ways leads to its logits."""
    if loaded.head is not None:
        return "matrix"
    return "head" if loaded.splits else "full call"


def largest_error(loaded: LoadedModel, text: Path, out: Path) -> str:
    """Caches the text; each document's first choices against what the model says of it alone."""
    settings = CacheSettings(
        teacher=loaded.source,
        data=str(text),
        out=out,
        tail="bucket",
        top_k=8,
        max_seq_len=LENGTH,
        batch_size=3,
    )
    run_cache(settings, QUIET, teacher=loaded)
    worst = max(_errors(loaded, LogitCache(out)))
    return f"{worst:.4f}" if worst <= LARGEST_ERROR else f"!cached {worst:.3g} nats from the plain call"


def _errors(loaded: LoadedModel, cache: LogitCache) -> list[float]:
    found = []
    with cache.batches(batch_size=4, seed=0, epochs=1) as batches:
        for batch in batches:
            target = TeacherTarget.from_arrays(batch.targets, cache.spec).at(1.0)
            shape = batch.token_ids.shape
            ids = np.array(target.head_ids).reshape(*shape, -1)
            logprobs = np.array(target.head_logprobs).reshape(*shape, -1)
            for row, number in _documents(batch.documents):
                where = (batch.documents[row] == number) & batch.loss_mask[row]
                inside = batch.loss_mask[row][batch.documents[row] == number]
                plain = _plain(loaded, batch.token_ids[row][batch.documents[row] == number])[inside]
                expected = np.take_along_axis(plain, ids[row, where], axis=-1)
                best = -np.sort(-plain, axis=-1)[:, : ids.shape[-1]]
                found += [np.abs(logprobs[row, where] - e).max() for e in (expected, best) if e.size]
    return [float(value) for value in found]


def _documents(numbers: np.ndarray) -> list[tuple[int, int]]:
    return [(row, number) for row in range(len(numbers)) for number in np.unique(numbers[row]) if number >= 0]


def _plain(loaded: LoadedModel, token_ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of a document, as mlx_lm computes them for a prompt."""
    from mlx_lm.models.cache import make_prompt_cache

    logits = loaded.model(mx.array(token_ids[None]), cache=make_prompt_cache(loaded.model))[0]
    logits = logits.astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)


def trained(name: str, folder: Path, kind: Literal["full", "lora"]) -> str:
    """Two steps from the cache, or a word where mlx_lm cannot train it either."""
    try:
        return _trained(folder, kind)
    except Exception:
        if mlx_lm_trains(name, kind):
            raise
        return NOT_IN_MLX_LM


def mlx_lm_trains(name: str, kind: Literal["full", "lora"]) -> bool:
    """Whether the architecture's own gradients of a cross-entropy can be had, and are numbers."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, ids = stirred_model(name), mx.arange(40, 60)[None]
    if kind == "lora":
        model.freeze()
        linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    model.train()

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]).mean()

    try:
        _, gradients = nn.value_and_grad(model, loss)(model)
        return all(bool(mx.isfinite(gradient).all()) for _, gradient in tree_flatten(gradients))
    except (AttributeError, ValueError):
        return False


def _trained(folder: Path, kind: Literal["full", "lora"]) -> str:
    """Two steps from the cache change what is trained, and the loss is a number."""
    out = folder / f"run-{kind}"
    settings = TrainSettings(
        student=str(folder / "model"),
        cache=str(folder / "cache"),
        out=out,
        fine_tune_type=kind,
        iters=2,
        batch_size=2,
        learning_rate=1e-3,
    )
    result = run_train(settings, QUIET)
    name = "model/model.safetensors" if kind == "full" else "adapters.safetensors"
    after: Any = mx.load(str(out / name))
    before: Any = mx.load(str(folder / "model" / "model.safetensors")) if kind == "full" else {}
    moved = any(
        bool((value != before[key]).any()) if key in before else bool((value != 0).any())
        for key, value in after.items()
    )
    if not moved or not np.isfinite(result["loss"]):
        raise AssertionError(f"loss {result['loss']}, weights {'moved' if moved else 'as before'}")
    return "yes"


def cut(folder: Path) -> str:
    """A student with half of the layers loads and gives numbers."""
    make_student(NewStudent(teacher=str(folder / "model"), out=folder / "student"), QUIET)
    student = load_model(folder / "student")
    logits = student.full(mx.arange(3, 11)[None])
    if not bool(mx.isfinite(logits).all()):
        raise AssertionError("its logits are no numbers")
    return "yes"

"""One tokenizer, embeddings padded to different sizes: both stages and evaluation. And other tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from pmetal_distill.config import DistillConfig
from pmetal_distill.distiller import Distiller
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli
from tests.tiny import SPECIAL_TOKENS, build_tiny_model

TOKENS = 300
SIZES = [(TOKENS + 293, TOKENS + 421), (TOKENS + 421, TOKENS + 293), (TOKENS, TOKENS + 20)]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A model with a tokenizer of 300 tokens and more rows, of which the teacher never learned the last."""

    def made(size: int, *, seed: int, quiet: bool = True, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("padded") / f"{size}"
        build_tiny_model(folder, vocab_size=size, tokenizer_size=TOKENS, seed=seed, **options)
        if quiet:
            file = folder / "model.safetensors"
            weights: Any = mx.load(str(file))
            name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
            weights[name] = weights[name] * (mx.arange(size) < TOKENS)[:, None]
            mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
        return folder

    return made


def caching(cli: Cli, teacher: Path, text: Path, out: Path, *words: object) -> Path:
    got = cli("cache", "--teacher", teacher, "--data", text, "--out", out, "--max-seq-len", 64, *words)
    assert got.code == 0, got.err
    return out


@pytest.mark.parametrize(("teacher_size", "student_size"), SIZES)
@pytest.mark.parametrize("tail", ["sketch", "bucket", "none"])
def test_all_stages_from_a_cache(
    cli: Cli, make: Make, text_file: Path, tmp_path: Path, tail: str, teacher_size: int, student_size: int
) -> None:
    teacher = make(teacher_size, seed=0)
    student = make(student_size, seed=1, quiet=False, num_layers=2)
    sketch = ("--sketch-rank", 8, "--calibration-tokens", 500) if tail == "sketch" else ()
    cache = caching(cli, teacher, text_file, tmp_path / "cache", "--tail", tail, *sketch)
    assert LogitCache(cache).spec.vocab_size == teacher_size
    steps = ("--iters", 10, "--alpha", 1.0, "--temperature", 1.0, "--learning-rate", 3e-3)
    got = cli("train", "--student", student, "--cache", cache, "--out", tmp_path / "run", *steps, "--json")
    assert got.code == 0, got.err
    assert np.isfinite([got.json["loss"], got.json["soft"], got.json["hard"]]).all()
    trained = load_model(tmp_path / "run" / "model")
    assert trained.vocab_size == student_size
    judged = ("--teacher", teacher, "--data", text_file, "--split", "train", "--json")
    before, after = (cli("eval", model, *judged) for model in (student, tmp_path / "run"))
    assert (before.code, after.code) == (0, 0), after.err
    assert 0 < after.json["kl@1"] < before.json["kl@1"]
    cached = cli("eval", tmp_path / "run", "--cache", cache, "--json")
    assert cached.code == 0, cached.err
    assert np.isfinite(cached.json["kl@1"])


@pytest.mark.parametrize(("teacher_size", "student_size"), SIZES)
def test_beside_a_live_teacher(
    cli: Cli, make: Make, text_file: Path, tmp_path: Path, teacher_size: int, student_size: int
) -> None:
    words = ("--teacher", make(teacher_size, seed=0), "--data", text_file, "--max-seq-len", 64, "--iters", 4)
    student = make(student_size, seed=1, quiet=False, num_layers=2)
    got = cli("train", "--student", student, *words, "--out", tmp_path / "run", "--json")
    assert got.code == 0, got.err
    assert np.isfinite(got.json["loss"])
    assert load_model(tmp_path / "run" / "model").vocab_size == student_size


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def slope_of_head(student: LoadedModel, step: Callable[[], Any]) -> np.ndarray:
    """The gradient of the head's matrix in a step of plain gradient descent with rate 1."""
    assert student.head is not None
    before = np.array(student.head.weight, np.float64)
    step()
    return before - np.array(student.head.weight, np.float64)


class TestPaddingRows:
    """Row j gets the mean of (q_j - p_j) h over tokens; rows that one of the two lacks do not exist."""

    CONFIG = DistillConfig(alpha=1.0, temperature=1.0, max_grad_norm=None)

    @pytest.mark.parametrize(("teacher_size", "student_size"), SIZES)
    def test_beside_a_live_teacher(self, make: Make, teacher_size: int, student_size: int) -> None:
        teacher = load_model(make(teacher_size, seed=0, quiet=False))
        student = load_model(make(student_size, seed=1, quiet=False, num_layers=2, tie=False))
        ids = np.random.default_rng(0).integers(0, TOKENS, (2, 9)).astype(np.int32)
        shared = min(teacher_size, student_size)
        states = np.array(student.hidden(mx.array(ids)).final, np.float64)[:, :-1].reshape(-1, 32)
        q, p = (
            softmax(np.array(model.full(mx.array(ids)), np.float64)[:, :-1, :shared].reshape(-1, shared))
            for model in (student, teacher)
        )
        distiller = Distiller(teacher, student, self.CONFIG, optimizer=optim.SGD(learning_rate=1.0))
        found = slope_of_head(student, lambda: distiller.step(ids))
        expected = (q - p).T @ states / len(states)
        np.testing.assert_allclose(found[:shared], expected, atol=1e-5)
        assert np.abs(found[TOKENS:shared]).max(initial=0) > 1e-3 or shared == TOKENS
        assert not found[shared:].any()

    @pytest.mark.parametrize(("teacher_size", "student_size"), SIZES)
    def test_from_a_cache_without_the_tails_shape(
        self, cli: Cli, make: Make, text_file: Path, tmp_path: Path, teacher_size: int, student_size: int
    ) -> None:
        """A token of the tail gets its share of the student's tail, times the teacher's tail mass."""
        words = ("--tail", "bucket", "--top-k", 8)
        cache = LogitCache(caching(cli, make(teacher_size, seed=0), text_file, tmp_path / "c", *words))
        student = load_model(make(student_size, seed=1, quiet=False, num_layers=2, tie=False))
        with cache.batches(batch_size=2, seed=0) as batches:
            batch = next(batches)
        shared = min(teacher_size, student_size)
        mask = batch.loss_mask
        states = student.hidden(mx.array(batch.token_ids), documents=batch.documents).final
        q = softmax(np.array(student.logits(states), np.float64)[mask][:, :shared])
        heads = batch.targets.head_ids.reshape(*mask.shape, -1)[mask]
        logprobs = batch.targets.head_logprobs.reshape(*mask.shape, -1)[mask].astype(np.float64)
        curve = batch.targets.tail_curve.reshape(*mask.shape, -1)[mask]
        tail = logprobs[:, -1] + cache.spec.curve.evaluate(curve, 1.0)
        total = np.logaddexp(np.logaddexp.reduce(logprobs, axis=1), tail)
        outside = np.ones_like(q, bool)
        np.put_along_axis(outside, heads, False, axis=1)
        p = q * outside / (q * outside).sum(-1, keepdims=True) * np.exp(tail - total)[:, None]
        np.put_along_axis(p, heads, np.exp(logprobs - total[:, None]), axis=1)
        distiller = Distiller(cache, student, self.CONFIG, optimizer=optim.SGD(learning_rate=1.0))
        found = slope_of_head(student, lambda: distiller.step(batch))
        expected = (q - p).T @ np.array(states, np.float64)[mask] / mask.sum()
        np.testing.assert_allclose(found[:shared], expected, atol=2e-5)
        assert not found[shared:].any()


def test_a_teacher_that_prefers_rows_which_the_student_lacks(
    cli: Cli, make: Make, text_file: Path, tmp_path: Path
) -> None:
    cache = caching(
        cli, make(TOKENS + 400, seed=0, quiet=False), text_file, tmp_path / "c", "--tail", "bucket"
    )
    student = make(TOKENS, seed=1, num_layers=2)
    got = cli("train", "--student", student, "--cache", cache, "--out", tmp_path / "run")
    assert got.code == 1
    assert "head ids must be below 300, the student's vocabulary" in got.err
    assert "take a student with an embedding of 700 rows" in got.err


class TestOtherTokenizers:
    """Models of the same sizes that number tokens differently."""

    @pytest.fixture
    def stranger(self, tmp_path: Path) -> Path:
        """Trained on another text, with as many tokens."""
        folder = build_tiny_model(tmp_path / "stranger", vocab_size=TOKENS, num_layers=2)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
            show_progress=False,
        )
        tokenizer.train_from_iterator(
            ["zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich"] * 3, trainer
        )
        assert tokenizer.get_vocab_size() == TOKENS
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    @pytest.fixture
    def exchanged(self, tmp_path: Path) -> Path:
        """The same tokens, two of them under each other's numbers."""
        folder = build_tiny_model(tmp_path / "exchanged", vocab_size=TOKENS, num_layers=2)
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    @pytest.mark.parametrize(
        ("name", "difference"),
        [("stranger", "token '"), ("exchanged", r"token 'a' has id 67 in the one, 68 in the other")],
    )
    def test_are_refused_with_the_first_differences(
        self,
        cli: Cli,
        make: Make,
        request: pytest.FixtureRequest,
        text_file: Path,
        tmp_path: Path,
        name: str,
        difference: str,
    ) -> None:
        other: Path = request.getfixturevalue(name)
        teacher = make(TOKENS, seed=0)
        cache = caching(cli, teacher, text_file, tmp_path / "c", "--tail", "bucket")
        live = ("--teacher", teacher, "--data", text_file)
        for words in (
            ("train", "--student", other, "--cache", cache, "--out", tmp_path / "a"),
            ("train", "--student", other, *live, "--out", tmp_path / "b"),
            ("eval", other, *live, "--split", "train"),
            ("eval", other, "--cache", cache),
        ):
            got = cli(*words)
            assert got.code == 1, words
            assert "found differences: " in got.err
            assert difference in got.err
            assert got.err.count("has id") <= 5

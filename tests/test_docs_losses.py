"""The formulas of docs/losses.md, evaluated as they are written there, against the package."""

import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.losses import HeadOptions, HeadParts, HiddenStateLoss, head_loss
from pmetal_distill.losses.divergences import LOSS_NAMES, Divergence
from pmetal_distill.losses.functional import divergence_loss, hard_cross_entropy
from pmetal_distill.tail_basis import TailBasis
from pmetal_distill.target import TeacherTarget
from schemas.curve import TailCurve
from tools.reference.sources import ROOT

PAGE = (ROOT / "docs/losses.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^##? (.+?)\n(.*?)(?=^##? |\Z)", PAGE, re.MULTILINE | re.DOTALL))
V, K, T, TOKENS = 40, 5, 2.0, 3
NODES = (0.125, 0.25, 0.5, 0.75, 1.0)  # 1 / T is one of them: there the stored curve is exact
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
Names = dict[str, Any]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


WORDS = {
    name: getattr(np, name)
    for name in ("log", "exp", "sum", "abs", "sign", "mean", "sqrt", "append", "zeros")
}
WORDS |= {"softmax": softmax, "V": V, "T": T}


def blocks(section: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)


def run(block: str, **given: Any) -> Names:
    names = {**WORDS, **given}
    exec(block, names)  # noqa: S102 - our own page
    return names


def evaluate(expression: str, **given: Any) -> Any:
    return eval(expression, {**WORDS, **given})  # noqa: S307 - our own page


def table(section: str) -> list[list[str]]:
    """The first table's cells, without their code marks."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in lines]


FORMULAS = {row[0]: row[1:] for row in table("Soft losses") if row[0] in LOSS_NAMES}


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return tuple(2 * rng.standard_normal((TOKENS, V)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def soft_and_slope(name: str, p: np.ndarray, q: np.ndarray) -> tuple[Any, Any]:
    """`D` and `slope` as the table has them."""
    divergence, mixture, slope, parameter = FORMULAS[name]
    given: Names = {"p": p, "q": q}
    if parameter:
        word, _, value = parameter.partition("`, ")
        given[word] = float(value)
    if mixture:
        given["m"] = evaluate(mixture, **given)
    return evaluate(divergence, **given), evaluate(slope, **given)


def package(name: str, s: np.ndarray, target: TeacherTarget) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient per token, through MLX, with the package's usual parameter."""

    def losses(x: mx.array) -> mx.array:
        return divergence_loss(x, target, divergence=Divergence(name), temperature=T)

    gradient = mx.grad(lambda x: losses(x).sum())(mx.array(s))
    return np.array(losses(mx.array(s))), np.array(gradient)


def test_every_loss_is_in_the_table() -> None:
    assert tuple(FORMULAS) == LOSS_NAMES
    for name in LOSS_NAMES:
        assert f"`{name}`" in PAGE.split("| when | loss |")[1]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_soft_losses(name: str, logits: tuple[np.ndarray, np.ndarray]) -> None:
    (distributions,), (gradient,) = blocks("The losses"), blocks("Soft losses")
    values, gradients = package(name, logits[1], TeacherTarget.dense(mx.array(logits[0])))
    for token in range(TOKENS):
        names = run(distributions, z=logits[0][token].astype(float), s=logits[1][token].astype(float))
        value, slope = soft_and_slope(name, names["p"], names["q"])
        np.testing.assert_allclose(values[token], value, **TOLERANCE)
        found = run(gradient, slope=slope, q=names["q"])["gradient"]
        np.testing.assert_allclose(gradients[token], found, **TOLERANCE)


class TestTail:
    @pytest.fixture
    def cached(self, logits: tuple[np.ndarray, np.ndarray]) -> Names:
        """The parts of a cached target of the teacher's logits."""
        z, rng = logits[0], np.random.default_rng(6)
        ids = np.argsort(-z, axis=-1)[:, :K].astype(np.int32)
        logprobs = np.log([softmax(row) for row in z.astype(float)])
        curve = np.empty((TOKENS, len(NODES)), np.float32)
        for token in range(TOKENS):
            tail = np.delete(z[token].astype(float), ids[token]) - z[token, ids[token, -1]]
            curve[token] = [np.log(np.exp(b * tail).sum()) for b in NODES]
        return {
            "ids": ids,
            "head": np.take_along_axis(logprobs, ids, -1).astype(np.float32),
            "curve": curve,
            "mean": rng.standard_normal(V).astype(np.float32),
            "components": rng.standard_normal((V, 4)).astype(np.float32),
            "y": rng.standard_normal((TOKENS, 4)).astype(np.float32),
        }

    def target(self, kind: str, c: Names) -> TeacherTarget:
        head = mx.array(c["ids"]), mx.array(c["head"])
        if kind == "none":
            return TeacherTarget.none(*head, vocab_size=V)
        curve = TailCurve(NODES, V, K)
        if kind == "bucket":
            return TeacherTarget.bucket(*head, mx.array(c["curve"]), curve=curve)
        basis = TailBasis(mx.array(c["mean"]), mx.array(c["components"]))
        parts = mx.array(c["curve"]), mx.array(c["y"])
        return TeacherTarget.sketch(*head, *parts, curve=curve, bases=[basis])

    def token_names(self, token: int, logits: tuple[np.ndarray, np.ndarray], c: Names) -> Names:
        z, s = (rows[token].astype(float) for rows in logits)
        head = c["ids"][token]
        tail = np.setdiff1d(np.arange(V), head)
        names = {"z": z, "s": s, "head": head, "tail": tail, "z_ref": z[head].min(), "q": softmax(s / T)}
        return names | {"mean": c["mean"], "components": c["components"], "y": c["y"][token]}

    @pytest.mark.parametrize("kind", ["none", "bucket", "sketch"])
    @pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "reverse_kl"])
    def test_events(self, kind: str, name: str, logits: tuple[np.ndarray, np.ndarray], cached: Names) -> None:
        if kind == "none" and name == "reverse_kl":
            pytest.skip("refused")
        none, bucket, sketch, shares = blocks("What the tail contributes")
        (gradient,) = blocks("Soft losses")
        values, gradients = package(name, logits[1], self.target(kind, cached))
        for token in range(TOKENS):
            names = self.token_names(token, logits, cached)
            found = run(none if kind == "none" else bucket, **names)
            if kind == "sketch":
                found = run(sketch, **names, bucket=found["events"], events=np.empty(V))
            with np.errstate(divide="ignore", invalid="ignore"):
                value, slope = soft_and_slope(name, found["events"], found["q_events"])
            if kind == "none":  # 0 log 0 is 0; the page's table is for p > 0
                value, slope = self.of_none(name, found)
            if kind != "sketch":
                slope = run(shares, **names, slope_events=slope)["slope"]
            np.testing.assert_allclose(values[token], value, **TOLERANCE)
            wanted = run(gradient, slope=slope, q=names["q"])["gradient"]
            np.testing.assert_allclose(gradients[token], wanted, **TOLERANCE)

    def of_none(self, name: str, found: Names) -> tuple[Any, Any]:
        return soft_and_slope(name, np.maximum(found["events"], 1e-300), found["q_events"])


class TestTheRest:
    def test_the_text(self, logits: tuple[np.ndarray, np.ndarray]) -> None:
        (block,) = blocks("Text")
        labels = np.array([3, 0, V - 1], np.int32)
        values = np.array(hard_cross_entropy(mx.array(logits[1]), mx.array(labels)))
        gradient = mx.grad(lambda x: hard_cross_entropy(x, mx.array(labels)).sum())(mx.array(logits[1]))
        for token, label in enumerate(labels):
            names = run(block, s=logits[1][token].astype(float), label=label, one_hot=np.eye(V)[label])
            np.testing.assert_allclose(values[token], names["hard"], **TOLERANCE)
            np.testing.assert_allclose(np.array(gradient)[token], names["hard_gradient"], **TOLERANCE)

    def test_the_sum(self, logits: tuple[np.ndarray, np.ndarray]) -> None:
        (block,) = blocks("Together")
        rng = np.random.default_rng(7)
        hidden, weight = (mx.array(rng.standard_normal(s).astype(np.float32)) for s in ((TOKENS, 6), (V, 6)))
        target = TeacherTarget.dense(mx.array(logits[0])).at(T)
        labels, mask = mx.array([1, 2, 3]), mx.array([1.0, 0.0, 1.0])
        parts = head_loss(hidden, HeadParts(weight), target, labels, mask, alpha=0.3)
        parts = parts.with_hidden(mx.array(0.7), 0.1)
        s = np.array(hidden @ weight.T).astype(float)
        soft = np.mean(
            [soft_and_slope("forward_kl", softmax(logits[0][t] / T), softmax(s[t] / T))[0] for t in (0, 2)]
        )
        hard = np.mean([-np.log(softmax(s[t])[label]) for t, label in ((0, 1), (2, 3))])
        names = run(block, alpha=0.3, soft=soft, hard=hard, hidden_weight=0.1, hidden=0.7)
        assert parts.total.item() == pytest.approx(names["total"], rel=2e-5)

    @pytest.mark.parametrize("kind", HiddenStateLoss)
    def test_hidden_states(self, kind: HiddenStateLoss) -> None:
        formula = {row[0]: row[1] for row in table("Hidden states")}[kind.value]
        h_s, h_t = np.random.default_rng(8).standard_normal((2, TOKENS, 12)).astype(np.float32)
        found = np.array(kind.per_token(mx.array(h_s), mx.array(h_t)))
        wanted = [
            evaluate(formula, h_s=a.astype(float), h_t=b.astype(float)) for a, b in zip(h_s, h_t, strict=True)
        ]
        np.testing.assert_allclose(found, wanted, **TOLERANCE)

    def test_taid(self, logits: tuple[np.ndarray, np.ndarray]) -> None:
        (block,) = blocks("TAID")
        head = HeadParts(mx.eye(V))
        parts = head_loss(
            mx.array(logits[1]),
            head,
            TeacherTarget.dense(mx.array(logits[0])).at(T),
            mx.zeros((TOKENS,), mx.int32),
            mx.ones((TOKENS,)),
            alpha=1.0,
            teacher_share=0.6,
            options=HeadOptions(backend="plain"),
        )
        values = []
        for z, s in zip(*(rows.astype(float) for rows in logits), strict=True):
            p = run(block, t=0.6, z=z, s=s)["p"]
            values.append(soft_and_slope("forward_kl", p, softmax(s / T))[0])
        assert parts.soft.item() == pytest.approx(np.mean(values), rel=2e-5)


def test_its_usual_parameters_are_those_of_the_package() -> None:
    for name, row in FORMULAS.items():
        if row[3]:
            assert Divergence(name).parameter == float(row[3].partition("`, ")[2])


def test_a_wrong_formula_is_noticed(
    logits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    check: Callable[..., None] = test_soft_losses
    monkeypatch.setitem(FORMULAS, "forward_kl", ["sum(q * log(p / q))", *FORMULAS["forward_kl"][1:]])
    with pytest.raises(AssertionError):
        check("forward_kl", logits)

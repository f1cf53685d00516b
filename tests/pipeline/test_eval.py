"""`eval` as a user runs it, on tiny models: against a live teacher, a cache, and by the harness's tasks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pipeline.data import PackSettings, load_documents, pack, tokenize_all
from pipeline.data.kinds import DocumentKinds, document_kinds
from pipeline.eval_text import evaluation_text
from pmetal_distill.models import LoadedModel, load_model
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import DataError
from tests.pipeline.conftest import SENTENCES, Cli
from tests.pipeline.training.sources import make_cache

LENGTH = 64


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of documents of three kinds."""
    root = tmp_path_factory.mktemp("eval") / "data"
    (root / "more").mkdir(parents=True)
    for name, numbers in (("first.jsonl", range(7)), ("more/second.jsonl", range(7, 12))):
        records = [
            {"text": SENTENCES[n % 3] * (1 + 2 * (n % 4)), "kind": ("prose", 7, "code")[n % 3]}
            for n in numbers
        ]
        (root / name).write_text("\n\n".join(json.dumps(record) for record in records))
    return root


def slow(teacher: LoadedModel, student: LoadedModel, folder: Path, kind_of: Callable[[Any], str]) -> Any:
    """Every figure of every group, one document window at a time, in float64.

    A token's position is the number of tokens before it in its window, which is all that a model sees.
    """
    values: dict[str, dict[str, list[list[float]]]] = {"by_position": {}, "by_kind": {}, "all": {"": []}}
    for document in load_documents(folder):
        ids = [*teacher.tokenizer.encode(document.text), teacher.tokenizer.eos_token_id]
        for start in range(0, len(ids), LENGTH):
            window = ids[start : start + LENGTH]
            p, q = (np.array(model.full(mx.array([window]))[0], np.float64) for model in (teacher, student))
            last = start + LENGTH >= len(ids)
            for position in range(len(window) - last):
                lp, lq = log_softmax(p[position]), log_softmax(q[position])
                lp2, lq2 = log_softmax(p[position] / 2), log_softmax(q[position] / 2)
                labelled = position + 1 < len(window)
                row = [
                    np.exp(lp) @ (lp - lq),
                    np.exp(lp2) @ (lp2 - lq2),
                    float(lp.argmax() == lq.argmax()),
                    -lq[window[position + 1]] if labelled else np.nan,
                ]
                bounds = next(b for b in ((0, 15), (16, 63)) if position <= b[1])
                values["by_position"].setdefault(f"{bounds[0]}-{bounds[1]}", []).append(row)
                values["by_kind"].setdefault(kind_of(document), []).append(row)
                values["all"][""].append(row)
    return {
        grouping: {
            name: {
                **dict(zip(("kl@1", "kl@2", "top1"), np.mean(rows, axis=0), strict=False)),
                "perplexity": np.exp(np.nanmean(np.array(rows)[:, 3])),
                "tokens": len(rows),
            }
            for name, rows in groups.items()
        }
        for grouping, groups in values.items()
    }


@pytest.mark.parametrize("feature", [None, "kind"])
def test_figures_by_position_and_kind_are_those_of_the_slow_path(
    feature: str | None, cli: Cli, folder: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    words = ("--teacher", tiny_teacher, "--data", folder, "--split", "train", "--max-seq-len", LENGTH)
    chosen = () if feature is None else ("--kind-feature", feature)
    got = cli("eval", tiny_student, *words, *chosen, "--batch-size", 3, "--head-chunk", 50, "--json")
    assert got.code == 0, got.err

    def kind_of(document: Any) -> str:
        if feature is None:
            return str(Path(document.source).relative_to(folder))
        return "code" if "def" in document.text else "7" if "teacher" in document.text else "prose"

    expected = slow(load_model(tiny_teacher), load_model(tiny_student), folder, kind_of)
    for grouping, label in (("by_position", "position"), ("by_kind", "kind")):
        rows = {row[label]: row for row in got.json[grouping]}
        assert rows.keys() == expected[grouping].keys()
        for name, figures in expected[grouping].items():
            assert {key: rows[name][key] for key in figures} == pytest.approx(figures, rel=2e-5)
    assert {key: got.json[key] for key in expected["all"][""]} == pytest.approx(expected["all"][""], rel=2e-5)
    for name, error in (("reliability", "ece"), ("reliability_teacher", "ece_teacher")):
        bins = got.json[name]
        total = sum(row["tokens"] for row in bins)
        gaps = sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
        assert got.json[error] == pytest.approx(gaps / total)


def test_a_folder_gives_its_test_split_and_a_single_file_itself(
    cli: Cli, tiny_teacher: Path, tiny_student: Path, tmp_path: Path
) -> None:
    for split, text in (("train", SENTENCES[0]), ("test", SENTENCES[1])):
        (tmp_path / f"{split}.txt").write_text(text)
    words = ("eval", tiny_student, "--teacher", tiny_teacher, "--json", "--quiet", "--data")
    whole, file = cli(*words, tmp_path), cli(*words, tmp_path / "test.txt")
    assert (whole.code, file.code) == (0, 0), whole.err + file.err
    assert whole.json["kl@1"] == file.json["kl@1"]
    assert cli(*words, tmp_path / "train.txt").json["kl@1"] != file.json["kl@1"]


def test_tables_fit_80_columns(cli: Cli, tiny_teacher: Path, tiny_student: Path, tmp_path: Path) -> None:
    for name in ("a" * 70, "b" * 70):
        (tmp_path / f"{name}.txt").write_text(SENTENCES[0])
    words = ("--teacher", tiny_teacher, "--data", tmp_path, "--split", "train")
    got = cli("eval", tiny_student, *words, "--temperatures", "1,2,3,4,5", "--quiet")
    assert got.code == 0, got.err
    assert max(map(len, got.out.splitlines())) <= 80
    assert "...aaaa" in got.out
    assert "reliability" not in got.out
    assert "kl@5" in got.out


def test_only_the_largest_groups_are_tabulated() -> None:
    rows = [{"kind": f"k{n}", "kl@1": 1.0, "top1": 0.5, "tokens": n} for n in range(1, 31)]
    text = evaluation_text({"tokens": 465, "by_kind": rows})
    assert "k30" in text
    assert "k10" not in text
    assert "10 smaller ones in --json" in text


class TestCache:
    def test_figures_are_those_of_the_cached_events(
        self, cli: Cli, bucket_cache: Path, tiny_student: Path
    ) -> None:
        got = cli("eval", tiny_student, "--cache", bucket_cache, "--temperatures", "1,3", "--json")
        assert got.code == 0, got.err
        cache, student = LogitCache(bucket_cache), load_model(tiny_student)
        kl: dict[float, list[float]] = {1.0: [], 3.0: []}
        agree, nll = [], []
        for number in range(cache.num_sequences):
            row = cache.sequence(number)
            logits = np.array(
                student.full(mx.array(row.token_ids[None]), documents=row.documents[None])[0], np.float64
            )
            for n in np.flatnonzero(row.loss_mask):
                ids, stored = row.targets.head_ids[n], row.targets.head_logprobs[n].astype(np.float64)
                curve = row.targets.tail_curve[n]
                for t in kl:
                    lq = log_softmax(logits[n] / t)
                    head = stored / t
                    events = np.append(head, head[-1] + cache.spec.curve.evaluate(curve, 1 / t))
                    lp = log_softmax(events)
                    tail = np.log(np.exp(np.delete(lq, ids)).sum())
                    kl[t].append(np.exp(lp) @ (lp - np.append(lq[ids], tail)))
                agree.append(logits[n].argmax() == ids[0])
                if n + 1 < len(row) and row.documents[n + 1] == row.documents[n]:
                    nll.append(-log_softmax(logits[n])[row.token_ids[n + 1]])
        assert got.json["kl@1"] == pytest.approx(np.mean(kl[1.0]), rel=1e-4)
        assert got.json["kl@3"] == pytest.approx(np.mean(kl[3.0]), rel=1e-4)
        assert got.json["top1"] == pytest.approx(np.mean(agree))
        assert got.json["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
        assert got.json["tokens"] == len(agree)
        assert (got.json["sequences"], got.json["targets"]) == ("all", "bucket")
        assert "ece" in got.json
        assert "ece_teacher" not in got.json
        assert "by_kind" not in got.json

    def test_a_run_is_judged_on_what_it_held_out(
        self,
        cli: Cli,
        bucket_cache: Path,
        tiny_teacher: Path,
        tiny_student: Path,
        text_file: Path,
        tmp_path: Path,
    ) -> None:
        run = tmp_path / "run"
        words = ("--student", tiny_student, "--cache", bucket_cache, "--out", run, "--iters", 2, "--seed", 3)
        trained = cli(
            "train", *words, "--val-share", 0.2, "--val-batches", -1, "--steps-per-eval", 2, "--json"
        )
        assert trained.code == 0, trained.err
        judged = cli("eval", run, "--cache", bucket_cache, "--json").json
        assert judged["sequences"] == "held-out"
        for theirs, mine in (("val_kl@2", "kl@2"), ("val_top1", "top1"), ("val_perplexity", "perplexity")):
            assert judged[mine] == pytest.approx(trained.json[theirs], rel=1e-5)
        everything = cli("eval", run, "--cache", bucket_cache, "--sequences", "all", "--json").json
        assert everything["tokens"] > 3 * judged["tokens"]
        other = make_cache(tiny_teacher, text_file, tmp_path / "other")
        assert cli("eval", run, "--cache", other, "--json").json["sequences"] == "all"
        refused = cli("eval", tiny_student, "--cache", bucket_cache, "--sequences", "held-out")
        assert refused.code == 2
        assert "needs a run that was trained with --val-share" in refused.err

    def test_temperatures_that_the_cache_does_not_reach(
        self, cli: Cli, bucket_cache: Path, tiny_student: Path
    ) -> None:
        got = cli("eval", tiny_student, "--cache", bucket_cache, "--temperatures", "0.5")
        assert got.code == 2
        assert "must be at least 1" in got.err


class TestSubject:
    def test_adapters_are_judged_as_the_model_they_make(
        self, cli: Cli, bucket_cache: Path, tiny_student: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        words = ("--student", tiny_student, "--cache", bucket_cache, "--out", run, "--iters", 3)
        lora = ("--fine-tune-type", "lora", "--learning-rate", 1e-2, "--fuse")
        assert cli("train", *words, *lora).code == 0
        fused = cli("eval", run, "--cache", bucket_cache, "--json").json
        (run / "model").rename(tmp_path / "away")
        adapted = cli("eval", run, "--cache", bucket_cache, "--json").json
        start = cli("eval", tiny_student, "--cache", bucket_cache, "--json").json
        assert adapted["kl@1"] == pytest.approx(fused["kl@1"], rel=1e-4)
        assert abs(adapted["kl@1"] / start["kl@1"] - 1) > 1e-2

    def test_a_run_without_a_model(self, cli: Cli, bucket_cache: Path, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(f"student: s\nout: {tmp_path}\ncache: {bucket_cache}\n")
        got = cli("eval", tmp_path, "--cache", bucket_cache)
        assert got.code == 1
        assert "has written none yet" in got.err


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ((), "found none of them"),
            (("--teacher", "t"), "found --teacher"),
            (("--teacher", "t", "--data", "d", "--cache", "c"), "found --cache and --data and --teacher"),
            (("--data", "d", "--tasks", "a"), "found --data and --tasks"),
            (("--cache", "c", "--kind-feature", "k"), "--kind-feature: goes with --data"),
            (("--cache", "c", "--limit", "3"), "--limit: goes with --tasks"),
            (("--teacher", "t", "--data", "d", "--sequences", "all"), "--sequences: goes with --cache"),
            (("--cache", "c", "--temperatures", "0"), "--temperatures"),
            (("--cache", "c", "--batch-size", "0"), "--batch-size"),
        ],
    )
    def test_what_does_not_go_together(self, cli: Cli, words: tuple[str, ...], says: str) -> None:
        got = cli("eval", "student", *words)
        assert got.code == 2
        assert says in got.err


class TestTasks:
    def test_without_the_harness_it_says_what_to_install(
        self, cli: Cli, tiny_student: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        got = cli("eval", tiny_student, "--tasks", "arc_easy")
        assert got.code == 2
        assert "pip install lm-eval" in got.err

    def test_tasks_run_on_the_model_through_mlx_lms_adapter(
        self, cli: Cli, tiny_student: Path, harness: list[dict[str, Any]], bucket_cache: Path
    ) -> None:
        words = ("--tasks", "arc_easy, piqa", "--limit", 5, "--batch-size", 3)
        got = cli("eval", tiny_student, "--cache", bucket_cache, *words, "--json")
        assert got.code == 0, got.err
        assert got.json["tasks"]["arc_easy"]["acc,none"] == pytest.approx(_loglikelihood(tiny_student))
        assert got.json["kl@1"] > 0
        assert (harness[0]["tasks"], harness[0]["limit"]) == (["arc_easy", "piqa"], 5)
        table = cli("eval", tiny_student, *words)
        assert "arc_easy acc,none" in table.out

    def test_adapters_are_merged_for_the_tasks(
        self, cli: Cli, bucket_cache: Path, tiny_student: Path, tmp_path: Path, harness: list[dict[str, Any]]
    ) -> None:
        run = tmp_path / "run"
        words = ("--student", tiny_student, "--cache", bucket_cache, "--out", run, "--iters", 3)
        lora = ("--fine-tune-type", "lora", "--learning-rate", 1e-2, "--fuse")
        assert cli("train", *words, *lora).code == 0
        (run / "model").rename(tmp_path / "fused")
        got = cli("eval", run, "--tasks", "arc_easy", "--json").json["tasks"]["arc_easy"]["acc,none"]
        assert got == pytest.approx(_loglikelihood(tmp_path / "fused"), rel=1e-4)
        assert got != pytest.approx(_loglikelihood(tiny_student), rel=1e-4)

    def test_an_unknown_task(self, cli: Cli, tiny_student: Path, harness: list[dict[str, Any]]) -> None:
        got = cli("eval", tiny_student, "--tasks", "nonsense")
        assert got.code == 2
        assert "able to run nonsense, found ValueError" in got.err


PROMPT, ANSWER = "The quick brown", " fox jumps"


def _loglikelihood(folder: Path) -> float:
    """Log-probability of the answer behind the prompt, from all logits."""
    model = load_model(folder)
    whole = model.tokenizer.encode(PROMPT + ANSWER, add_special_tokens=False)
    start = len(model.tokenizer.encode(PROMPT, add_special_tokens=False))
    logprobs = log_softmax(np.array(model.full(mx.array([whole]))[0], np.float64))
    return float(sum(logprobs[n - 1, whole[n]] for n in range(start, len(whole))))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for lm_eval that asks mlx-lm's own adapter for one log-likelihood; records its options."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(*, model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        if "nonsense" in tasks:
            raise ValueError("no such task")
        calls.append({"tasks": tasks, **options})
        ((score, _),) = model.loglikelihood([SimpleNamespace(args=(PROMPT, ANSWER))])
        return {"results": {task: {"alias": task, "acc,none": score} for task in tasks}}

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api")}
    modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    modules["lm_eval"].__spec__ = SimpleNamespace(name="lm_eval")  # type: ignore[assignment]
    model, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    model.LM = type("LM", (), {})  # type: ignore[attr-defined]
    registry.register_model = lambda name: lambda cls: cls  # type: ignore[attr-defined]
    modules |= {"lm_eval.api.model": model, "lm_eval.api.registry": registry}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    return calls


class TestKinds:
    def kinds(self, path: Path, teacher: Path, feature: str | None) -> DocumentKinds | None:
        tokens = tokenize_all(load_documents(path), load_model(teacher).tokenizer)
        return document_kinds(pack(tokens, PackSettings(max_seq_len=LENGTH)), feature=feature)

    def test_of_a_parquet_column(self, tiny_teacher: Path, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = ["a", "b", "a", "c"]
        pq.write_table(pa.table({"text": [*SENTENCES, "More."], "kind": kinds}), tmp_path / "d.parquet")
        found = self.kinds(tmp_path / "d.parquet", tiny_teacher, "kind")
        assert found is not None
        assert [found.names[n] for n in found.of_document] == kinds
        with pytest.raises(DataError, match="must have the column 'sort', found 'text', 'kind'"):
            self.kinds(tmp_path / "d.parquet", tiny_teacher, "sort")

    def test_one_file_without_a_column_has_no_kinds(self, text_file: Path, tiny_teacher: Path) -> None:
        assert self.kinds(text_file, tiny_teacher, None) is None

    @pytest.mark.parametrize("value", [None, ["a"], 1.5, True])
    def test_values_that_are_no_kind(self, value: Any, tiny_teacher: Path, tmp_path: Path) -> None:
        path = tmp_path / "d.jsonl"
        path.write_text(
            json.dumps({"text": "One.", "kind": "a"}) + "\n" + json.dumps({"text": "Two.", "kind": value})
        )
        with pytest.raises(DataError, match=r"d\.jsonl:2: 'kind' must be a string or a whole number"):
            self.kinds(path, tiny_teacher, "kind")

    def test_text_files_have_no_columns(self, tiny_teacher: Path, tmp_path: Path) -> None:
        (tmp_path / "d.txt").write_text(SENTENCES[0])
        with pytest.raises(DataError, match="leave out --kind-feature"):
            self.kinds(tmp_path / "d.txt", tiny_teacher, "kind")

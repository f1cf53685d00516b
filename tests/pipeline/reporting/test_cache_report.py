"""The report of a cache says what the cache says."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.inspection import head_probabilities
from pipeline.reporting.cache_data import head_choices
from pipeline.reporting.pieces import TokenNames
from pmetal_distill.models import load_tokenizer
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli
from tests.pipeline.reporting.conftest import coloured, tips
from tests.pipeline.reporting.test_markup import Parsed


@pytest.fixture(scope="module")
def page(attacked_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from pipeline.console import Console
    from pipeline.reporting.build import ReportOptions, build_report

    out = tmp_path_factory.mktemp("out") / "cache.html"
    build_report(ReportOptions(str(attacked_cache), out), Console(quiet=True))
    return out.read_text()


def test_facts_and_measured_errors_are_there(page: str, attacked_cache: Path) -> None:
    text = "".join(Parsed(page).text)
    cache = LogitCache(attacked_cache)
    assert f"{cache.num_tokens:,}" in text
    assert cache.dataset.fingerprint["teacher"] in text
    assert "tail sketch" in text
    for record in cache.records:
        assert f"{record.measured['kl@2']:.4g}" in text


def test_bytes_by_column_add_up(page: str, attacked_cache: Path) -> None:
    from pipeline.inspection import describe
    from pipeline.reporting.cache_report import cache_report

    report = cache_report(str(attacked_cache), plan=[], footer="")
    (figure,) = [f for f in report.figures if f.name == "bytes"]
    total = sum(row[1] for row in figure.table.rows)
    assert total == pytest.approx(describe(attacked_cache)["bytes_per_token"], abs=0.01)
    assert {"head: ids", "tail sketch", "tail curve", "commit records"} <= {
        row[0] for row in figure.table.rows
    }


def test_tokens_show_what_the_teacher_expected(page: str, attacked_cache: Path) -> None:
    cache = LogitCache(attacked_cache, rank=0)
    probabilities, _ = head_probabilities(cache, cache.sequence(0), 4, 1.0)
    ((who, choices),) = tips(page)[4]["lists"]
    assert who == "the teacher expected"
    assert [choice[1] for choice in choices] == pytest.approx(probabilities[:5].tolist(), abs=1e-4)


@pytest.mark.parametrize("rank", [0, 2, 9, None])
def test_the_token_that_came_is_found_among_the_choices(attacked_cache: Path, rank: int | None) -> None:
    cache = LogitCache(attacked_cache, rank=0)
    row = cache.sequence(0)
    head, p = row.targets.head_ids[4], np.exp(row.targets.head_logprobs[4].astype(np.float64))
    ids = row.token_ids.copy()
    ids[5] = next(i for i in range(320) if i not in head) if rank is None else head[rank]
    names = TokenNames(load_tokenizer(cache.tokenizer_path), 5)
    choices, remark = head_choices(replace(row, token_ids=ids), 4, cache, names)
    assert [choice.same for choice in choices] == [place == rank for place in range(5)]
    if rank is None:
        assert remark == f"not among its first {len(head)}"
    else:
        assert remark == f"its choice {rank + 1}, {100 * p[rank]:.3g} %"


def test_the_strongest_colour_is_where_the_entropy_is_largest(page: str) -> None:
    values = [float(tip["heading"].partition("entropy ")[2].split()[0]) for tip in tips(page)]
    levels = [level for _, level in coloured(page)]
    assert len(values) == len(levels) > 100
    assert max(levels) == 9
    order = np.argsort(values)
    assert np.all(np.diff(np.array(levels)[order]) >= -1), "levels rise with values, but for rounding"


def test_the_text_is_whole_and_inert(page: str, attacked_cache: Path) -> None:
    parsed = Parsed(page)
    text = "".join(parsed.text)
    assert "onerror=window.attacked=2>" in text.replace("↵", "").replace("\n", "")
    names = [name for name, _ in parsed.tags]
    assert "img" not in names
    assert names.count("script") == 2, "the tokens and the page's own"
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert '"><script>window.attacked=3;' in text


def test_nothing_outside_is_named(page: str) -> None:
    for name, attributes in Parsed(page).tags:
        for key in ("src", "href", "action", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith("#"), (name, key, value)
    policies = [a["content"] for _, a in Parsed(page).tags if "http-equiv" in a]
    assert len(policies) == 1
    assert (policies[0] or "").startswith("default-src 'none'; style-src 'sha256-")
    assert "@import" not in page
    assert "url(" not in page


def test_a_bucket_cache_has_no_measured_errors(cli: Cli, bucket_cache: Path, tmp_path: Path) -> None:
    got = cli("report", bucket_cache, "--out", tmp_path / "r.html", "--json", "--quiet")
    assert got.code == 0, got.err
    assert got.err == ""
    assert got.json["kind"] == "cache"
    assert got.json["bytes"] == (tmp_path / "r.html").stat().st_size
    assert set(got.json["skipped"]) == {"errors", "plan"}
    assert "sketches only" in got.json["skipped"]["errors"]


def test_an_unfinished_cache_has_a_report(cli: Cli, bucket_cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bucket_cache, tmp_path / "copy"))
    records = sorted((copy / "commits").iterdir())
    records[1].unlink()
    assert cli("report", copy, "--out", tmp_path / "r.html").code == 0
    assert f"1 of {len(records)}" in (tmp_path / "r.html").read_text() or len(records) > 2
    for record in (copy / "commits").iterdir():
        record.unlink()
    got = cli("report", copy, "--out", tmp_path / "r.html", "--json")
    assert got.code == 0, got.err
    assert {"uncertainty", "bytes", "text"} <= got.json["skipped"].keys()


def test_a_cache_without_tails_shows_its_heads(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ("--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "c", "--tail", "none")
    assert cli("cache", *words).code == 0
    assert cli("report", tmp_path / "c", "--out", tmp_path / "r.html").code == 0
    text = "".join(Parsed((tmp_path / "r.html").read_text()).text)
    assert "keeps no tail" in text
    assert "Probability outside" not in text


class TestPlan:
    ROWS = (
        {"tail": "sketch", "top_k": 16, "rank": 8, "step": 60, "bytes_per_token": 50, "error@2": 0.04},
        {"tail": "bucket", "top_k": 64, "bytes_per_token": 130.5, "error@2": 0.3, "other": None},
        {"tail": "none", "note": "no figures here"},
    )

    def test_rows_become_points(self, cli: Cli, attacked_cache: Path, tmp_path: Path) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps({"rows": self.ROWS, "more": 1}))
        got = cli("report", attacked_cache, "--out", tmp_path / "r.html", "--plan", plan, "--json")
        assert got.code == 0, got.err
        assert "plan" not in got.json["skipped"]
        text = "".join(Parsed((tmp_path / "r.html").read_text()).text)
        assert "this cache" in text
        assert "130.5" in text
        assert "sketch, k 16, rank 8, step 60" in text

    @pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"rows": [{"tail": "sketch"}]}'])
    def test_other_files_are_refused(
        self, cli: Cli, bucket_cache: Path, tmp_path: Path, content: str
    ) -> None:
        plan = tmp_path / "plan.json"
        plan.write_text(content)
        got = cli("report", bucket_cache, "--out", tmp_path / "r.html", "--plan", plan)
        assert got.code == 2
        assert "plan --json" in got.err
        assert not (tmp_path / "r.html").exists()

"""vLLM's prompt_logprobs by their documented schema, written from a tiny teacher's true logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from pipeline.exchange.importing import FEW
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli, Outcome
from tests.pipeline.exchange.conftest import Truth, assert_same_targets, write_lines


def position(truth: Truth, row: int, own: int, k: int) -> dict[str, Any]:
    """What vLLM says before token `own`: that token with its rank in the vocabulary, then the top k."""
    logprobs = truth.logprobs[row]
    entries = [(own, float(logprobs[own]), int((logprobs >= logprobs[own]).sum()))]
    entries += [(i, p, rank) for rank, (i, p) in enumerate(truth.top(row, k), start=1)]
    return {str(i): {"logprob": p, "rank": rank, "decoded_token": "x"} for i, p, rank in entries}


def request_output(truth: Truth, k: int) -> dict[str, Any]:
    said = [None, *(position(truth, t, truth.ids[t + 1], k) for t in range(len(truth.ids) - 1))]
    return {"request_id": "0", "prompt": None, "prompt_token_ids": truth.ids, "prompt_logprobs": said}


def flattened(record: dict[str, Any], truth: Truth, k: int) -> dict[str, Any]:
    """The same as a FlatLogprobs, where the own token stands twice if it is among the top k."""
    flat: dict[str, Any] = {"start_indices": [0], "end_indices": [0], "token_ids": [], "logprobs": []}
    flat |= {"ranks": [], "decoded_tokens": []}
    for row, own in enumerate(truth.ids[1:]):
        flat["start_indices"].append(len(flat["token_ids"]))
        logprobs = truth.logprobs[row]
        entries = [(own, float(logprobs[own]), int((logprobs >= logprobs[own]).sum()))]
        entries += [(i, p, n) for n, (i, p) in enumerate(truth.top(row, k), start=1)]
        for token, logprob, rank in entries:
            for name, value in (("token_ids", token), ("logprobs", logprob), ("ranks", rank)):
                flat[name].append(value)
            flat["decoded_tokens"].append(None)
        flat["end_indices"].append(len(flat["token_ids"]))
    return record | {"prompt_logprobs": flat}


@pytest.fixture
def run(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Any:
    def go(source: Path, *words: object) -> Outcome:
        return cli(
            *("import", "vllm", source, "--out", tmp_path / "c", "--tokenizer", tiny_teacher),
            *("--teacher-name", "tiny", "--json", *words),
        )

    return go


class TestTargets:
    def test_are_those_of_our_own_cache(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        got = run(write_lines(tmp_path / "v.jsonl", [request_output(t, 12) for t in truths]))
        assert got.code == 0, got.err
        assert (got.json["top_k"], got.json["tail"]) == (12, "bucket")
        assert_same_targets(tmp_path / "c", own, k=12)
        cache = LogitCache(tmp_path / "c")
        row = cache.sequence(2)
        exact = 1 - np.exp(np.array([[p for _, p in truths[2].top(t, 12)] for t in range(len(row))])).sum(-1)
        on = row.loss_mask
        stored = 1 - np.exp(row.targets.head_logprobs.astype(np.float64)).sum(-1)
        np.testing.assert_allclose(stored[on], exact[on], atol=0.01)

    def test_flat_and_compressed_give_the_same(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        lines = [json.dumps(flattened(request_output(t, 12), t, 12)) for t in truths]
        source = tmp_path / "v.jsonl.zst"
        source.write_bytes(zstandard.compress("\n".join(lines).encode()))
        assert run(source).code == 0
        assert_same_targets(tmp_path / "c", own, k=12)

    def test_generated_tokens_follow_the_prompt(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        records = []
        for truth in truths:
            half = len(truth.ids) // 2
            record = request_output(truth, 12)
            said = record["prompt_logprobs"]
            output = {"index": 0, "token_ids": truth.ids[half:], "logprobs": said[half:]}
            records.append(
                {"prompt_token_ids": truth.ids[:half], "prompt_logprobs": said[:half], "outputs": [output]}
            )
        assert run(write_lines(tmp_path / "v.jsonl", records)).code == 0
        assert_same_targets(tmp_path / "c", own, k=12)

    def test_responses_of_a_server_and_of_a_batch(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        records: list[Any] = [request_output(t, 12) for t in truths]
        chat = {"choices": [{"index": 0, "message": {}}], **records[0]}
        completion = {"choices": [{"index": 0, "text": "", **records[1]}]}
        batch = {"custom_id": "a", "response": {"status_code": 200, "body": chat}}
        run(write_lines(tmp_path / "v.jsonl", [batch, completion, *records[2:]]))
        assert_same_targets(tmp_path / "c", own, k=12)

    def test_without_a_tail_shorter_rows_are_filled_with_impossible_tokens(
        self, run: Any, truths: list[Truth], cli: Cli, tiny_student: Path, tmp_path: Path
    ) -> None:
        records = [request_output(t, 12) for t in truths]
        del records[0]["prompt_logprobs"][3][str(truths[0].top(2, 12)[-1][0])]
        records[0]["prompt_logprobs"][3][str(truths[0].ids[3])] = {"logprob": -20.0, "rank": 300}
        got = run(write_lines(tmp_path / "v.jsonl", records), "--tail", "none")
        assert (got.json["top_k"], got.json["padded_rows"]) == (12, 1)
        row = LogitCache(tmp_path / "c").sequence(0)
        assert len(set(row.targets.head_ids[2].tolist())) == 12
        assert row.targets.head_logprobs[2, 11] < -500
        np.testing.assert_allclose(
            row.targets.head_logprobs[2, :11], [p for _, p in truths[0].top(2, 11)], atol=0.01
        )
        assert cli("verify", tmp_path / "c").code == 0
        words = ("train", "--student", tiny_student, "--cache", tmp_path / "c", "--out", tmp_path / "run")
        assert cli(*words, "--iters", 2, "--batch-size", 6, "--temperature", 4).code == 0

    def test_with_a_tail_few_short_rows_lose_their_target_and_many_lower_k(
        self, run: Any, truths: list[Truth], tmp_path: Path
    ) -> None:
        records = [request_output(t, 12) for t in truths]
        records[1]["prompt_logprobs"][5] = position(truths[1], 4, truths[1].ids[5], 7)
        got = run(write_lines(tmp_path / "v.jsonl", records))
        assert (got.json["top_k"], got.json["dropped"][FEW]) == (12, 1)
        assert not LogitCache(tmp_path / "c").sequence(1).loss_mask[4]
        assert LogitCache(tmp_path / "c").sequence(1).loss_mask[5]
        source = write_lines(tmp_path / "v.jsonl", [*records[1:], request_output(truths[0], 7)])
        got = run(source, "--out", tmp_path / "d")
        assert (got.json["top_k"], got.json["dropped"].get(FEW)) == (7, None)

    def test_minus_infinity_is_no_entry(self, run: Any, truths: list[Truth], tmp_path: Path) -> None:
        records = [request_output(t, 3) for t in truths]
        for entry, value in zip(records[0]["prompt_logprobs"][2].values(), (-9999.0, None), strict=False):
            entry["logprob"] = -float("inf") if value is None else value
        assert run(write_lines(tmp_path / "v.jsonl", records), "--tail", "none").code == 0


class TestRefusals:
    @pytest.fixture
    def records(self, truths: list[Truth]) -> list[dict[str, Any]]:
        return [request_output(t, 4) for t in truths]

    def refused(self, run: Any, records: list[Any], tmp_path: Path, *words: object) -> str:
        got = run(write_lines(tmp_path / "v.jsonl", records), *words)
        assert got.code in (1, 2)
        assert got.out == ""
        assert not (tmp_path / "c").exists()
        assert got.err.count("\n") == 1 + got.err.count("reading")
        return str(got.err.splitlines()[-1])

    def test_shifted_by_one(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        said = records[1]["prompt_logprobs"]
        records[1]["prompt_logprobs"] = [None, *said[2:], said[1]]
        message = self.refused(run, records, tmp_path)
        assert "v.jsonl:2: prompt_logprobs entry 0 must hold the text's own token" in message

    def test_first_entry_not_null(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        records[2]["prompt_logprobs"][0] = records[2]["prompt_logprobs"][1]
        assert "v.jsonl:3: prompt_logprobs must have an entry a token and null for the first" in self.refused(
            run, records, tmp_path
        )

    def test_one_short(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        del records[0]["prompt_logprobs"][-1]
        assert "v.jsonl:1" in self.refused(run, records, tmp_path)

    def test_logits_instead_of_logprobs(
        self, run: Any, records: list[Any], truths: list[Truth], tmp_path: Path
    ) -> None:
        for token, entry in records[0]["prompt_logprobs"][1].items():
            entry["logprob"] = float(truths[0].logits[0, int(token)] + 30)
        message = self.refused(run, records, tmp_path)
        assert "v.jsonl:1 row 0: probabilities must sum to at most 1" in message

    @pytest.mark.parametrize("value", [float("nan"), "x", None, True, 10**400])
    def test_no_number(self, run: Any, records: list[Any], tmp_path: Path, value: object) -> None:
        next(iter(records[3]["prompt_logprobs"][2].values()))["logprob"] = value
        assert "v.jsonl:4 prompt_logprobs entry 1: must map token ids" in self.refused(run, records, tmp_path)

    @pytest.mark.parametrize("token", [999, 10**9])
    def test_token_outside_the_vocabulary(
        self, run: Any, records: list[Any], tmp_path: Path, token: int
    ) -> None:
        entries = records[0]["prompt_logprobs"][4]
        entries[str(token)] = entries.pop(
            next(t for t in entries if t != str(records[0]["prompt_token_ids"][4]))
        )
        assert "v.jsonl:1" in self.refused(run, records, tmp_path)

    @pytest.mark.parametrize(
        "line",
        ['{"prompt_token_ids": [1, 2', "[]", "{}", '{"prompt_token_ids": [1, -2], "prompt_logprobs": []}'],
    )
    def test_bad_line(self, run: Any, records: list[Any], tmp_path: Path, line: str) -> None:
        source = write_lines(tmp_path / "v.jsonl", records[:2])
        source.write_text(source.read_text() + line + "\n")
        got = run(source)
        assert got.code == 1
        assert "v.jsonl:3" in got.err
        assert not (tmp_path / "c").exists()

    def test_no_prompt_logprobs(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        del records[0]["prompt_logprobs"]
        assert "prompt_logprobs=20" in self.refused(run, records, tmp_path)

    def test_hostile_flat_spans(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        records[0]["prompt_logprobs"] = {
            "start_indices": [0, 0],
            "end_indices": [3, 3],
            "token_ids": [1, 2, 3],
            "logprobs": [-1.0, -2.0, -3.0],
            "ranks": [1, 2, 3],
        }
        assert "fit each other" in self.refused(run, records, tmp_path)

    def test_too_much_wanted(self, run: Any, records: list[Any], tmp_path: Path) -> None:
        assert "top_k: must be at most 5" in self.refused(run, records, tmp_path, "--top-k", 6)
        assert "tail: must be 'bucket' or 'none'" in self.refused(run, records, tmp_path, "--tail", "sketch")


def test_resume_completes_an_interrupted_import(run: Any, truths: list[Truth], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "v.jsonl", [request_output(t, 6) for t in truths])
    assert run(source, "--sequences-per-shard", 2).code == 0
    whole = LogitCache(tmp_path / "c").root
    (tmp_path / "c/commits/00001.json").unlink()
    assert run(source, "--sequences-per-shard", 2).code == 2
    got = run(source, "--sequences-per-shard", 2, "--resume")
    assert got.json["new_tokens"] == sum(len(t.ids) for t in truths[2:4])
    assert LogitCache(tmp_path / "c").root == whole


def test_resume_refuses_another_source(run: Any, truths: list[Truth], tmp_path: Path) -> None:
    run(write_lines(tmp_path / "v.jsonl", [request_output(t, 6) for t in truths]))
    got = run(write_lines(tmp_path / "v.jsonl", [request_output(t, 6) for t in truths[::-1]]), "--resume")
    assert got.code == 1
    assert "--data (data): " in got.err


def test_provenance_and_what_is_lost_are_written_down(
    run: Any, truths: list[Truth], cli: Cli, tmp_path: Path
) -> None:
    run(write_lines(tmp_path / "v.jsonl", [request_output(t, 6) for t in truths]))
    facts = cli("inspect", tmp_path / "c", "--json").json
    assert facts["fingerprint"]["teacher"] == "imported: tiny"
    assert facts["meta"]["imported_from"] == "vllm"
    assert "interpolated" in facts["meta"]["lost"]
    assert json.loads(facts["fingerprint"]["packing"])["source_sha256"]
    assert cli("verify", tmp_path / "c").code == 0

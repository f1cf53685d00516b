"""Responses with `top_logprobs`: completions with echo, chats; token strings, bytes and ids."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.exchange.vocabulary import Vocabulary
from pmetal_distill.models import load_tokenizer
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli, Outcome
from tests.pipeline.exchange.conftest import Truth, assert_same_targets, write_lines
from tests.pipeline.exchange.test_vllm import position

Shown = Callable[[int], str]


def by_id(token: int) -> str:
    return f"token_id:{token}"


def top(truth: Truth, row: int, own: int, k: int) -> dict[int, float]:
    """At most k + 1 entries, the own token first, as vLLM's server gives them."""
    return {int(i): entry["logprob"] for i, entry in position(truth, row, own, k).items()}


def echoed(truth: Truth, k: int, shown: Shown) -> dict[str, Any]:
    tops = [top(truth, t, truth.ids[t + 1], k) for t in range(len(truth.ids) - 1)]
    logprobs = {
        "tokens": [shown(i) for i in truth.ids],
        "token_logprobs": [None, *(float(truth.logprobs[t, i]) for t, i in enumerate(truth.ids[1:]))],
        "top_logprobs": [None, *({shown(i): p for i, p in entries.items()} for entries in tops)],
        "text_offset": [],
    }
    return {"object": "text_completion", "choices": [{"index": 0, "text": "", "logprobs": logprobs}]}


def chat(truth: Truth, prompt_length: int, k: int, shown: Shown) -> dict[str, Any]:
    content = []
    for row in range(prompt_length - 1, len(truth.ids) - 1):
        own = truth.ids[row + 1]
        entries = list(top(truth, row, own, k).items())[:k]
        listed = [{"token": shown(i), "logprob": p, "bytes": list(shown(i).encode())} for i, p in entries]
        content.append({"token": shown(own), "bytes": list(shown(own).encode()), "top_logprobs": listed})
    return {"object": "chat.completion", "choices": [{"index": 0, "logprobs": {"content": content}}]}


@pytest.fixture
def run(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Any:
    def go(records: list[Any], *words: object) -> Outcome:
        source = write_lines(tmp_path / "o.jsonl", records)
        return cli(
            *("import", "openai", source, "--out", tmp_path / "c", "--tokenizer", tiny_teacher),
            *("--teacher-name", "tiny", "--json", *words),
        )

    return go


class TestIds:
    def test_completions_with_echo_are_our_own_cache(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        got = run([echoed(t, 12, by_id) for t in truths])
        assert got.code == 0, got.err
        assert got.json["top_k"] == 12
        assert_same_targets(tmp_path / "c", own, k=12)

    def test_chats_stand_behind_their_prompt(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        records = [chat(t, 5, 12, by_id) | {"prompt_token_ids": t.ids[:5]} for t in truths]
        got = run(records)
        assert got.code == 0, got.err
        ours, theirs = LogitCache(own), LogitCache(tmp_path / "c")
        for number, truth in enumerate(truths):
            row = theirs.sequence(number)
            assert row.token_ids.tolist() == truth.ids
            assert row.loss_mask.tolist() == [False] * 4 + [True] * (len(truth.ids) - 5) + [False]
            want = next(
                s for s in map(ours.sequence, range(ours.num_sequences)) if s.token_ids.tolist() == truth.ids
            )
            k = theirs.spec.k
            np.testing.assert_array_equal(row.targets.head_ids[4:-1], want.targets.head_ids[4:-1, :k])
            np.testing.assert_allclose(
                row.targets.head_logprobs[4:-1], want.targets.head_logprobs[4:-1, :k], atol=0.012
            )

    def test_prompts_come_out_of_the_request(
        self, run: Any, truths: list[Truth], tiny_teacher: Path, tmp_path: Path
    ) -> None:
        tokenizer = load_tokenizer(tiny_teacher)
        messages = [{"role": "user", "content": "The fox"}]
        answer = chat(truths[0], 5, 6, by_id)
        run([answer | {"messages": messages}, answer | {"request": {"prompt": "A teacher"}}])
        cache = LogitCache(tmp_path / "c")
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        for row, prompt in (
            (cache.sequence(0), template),
            (cache.sequence(1), tokenizer.encode("A teacher")),
        ):
            assert row.token_ids.tolist() == [*prompt, *truths[0].ids[5:]]
            assert row.loss_mask.argmax() == len(prompt) - 1

    def test_a_chat_without_its_prompt_is_refused(self, run: Any, truths: list[Truth]) -> None:
        got = run([chat(truths[0], 5, 6, by_id)])
        assert got.code == 1
        assert "o.jsonl:1: must tell the prompt" in got.err


class TestStrings:
    def test_only_positions_whose_tokens_map_keep_their_target(
        self, run: Any, truths: list[Truth], tiny_teacher: Path, tmp_path: Path
    ) -> None:
        tokenizer = load_tokenizer(tiny_teacher)

        def shown(token: int) -> str:
            return str(tokenizer.decode([token]))

        plain = [t for t in truths if all("�" not in shown(i) for i in t.ids)]
        assert len(plain) >= 4
        got = run([echoed(t, 1, shown) for t in plain])
        assert got.code == 0, got.err
        cache, refused = LogitCache(tmp_path / "c"), 0
        for number, truth in enumerate(plain):
            row = cache.sequence(number)
            assert row.token_ids.tolist() == truth.ids
            for t in range(len(truth.ids) - 1):
                mapped = all("�" not in shown(i) for i in top(truth, t, truth.ids[t + 1], 1))
                assert row.loss_mask[t] == mapped
                refused += not mapped
                if mapped:
                    token, logprob = truth.top(t, 1)[0]
                    assert row.targets.head_ids[t, 0] == token
                    assert row.targets.head_logprobs[t, 0] == pytest.approx(logprob, abs=0.012)
        assert refused > 0
        assert sum(n for what, n in got.json["dropped"].items() if "no single token" in what) == refused

    def test_a_text_that_does_not_map_is_refused(self, run: Any, truths: list[Truth]) -> None:
        record = echoed(truths[0], 2, by_id)
        record["choices"][0]["logprobs"]["tokens"][3] = "�"
        got = run([record])
        assert got.code == 1
        assert "o.jsonl:1: each token of the text must stand for one token" in got.err
        assert "number 3" in got.err

    def test_another_tokenizer_is_found_out(self, run: Any, truths: list[Truth]) -> None:
        def wrong(token: int) -> str:
            return f"<{token}>"

        records = []
        for truth in truths:
            record = echoed(truth, 3, wrong)
            record["choices"][0] |= {"prompt_token_ids": truth.ids, "token_ids": []}
            records.append(record)
        got = run(records)
        assert got.code == 1
        assert "must hold sequences with targets, found 6 sequences and 0 targets" in got.err

    def test_ids_of_the_server_go_before_strings(
        self, run: Any, truths: list[Truth], own: Path, tmp_path: Path
    ) -> None:
        records = []
        for truth in truths:
            record = echoed(truth, 12, by_id)
            record["choices"][0]["logprobs"]["tokens"] = ["�"] * len(truth.ids)
            record["choices"][0] |= {"prompt_token_ids": truth.ids[:4], "token_ids": truth.ids[4:]}
            records.append(record)
        assert run(records).code == 0
        assert_same_targets(tmp_path / "c", own, k=12)


class TestVocabulary:
    def test_bytes_find_what_strings_cannot(self, tiny_teacher: Path) -> None:
        tokenizer = load_tokenizer(tiny_teacher)
        vocabulary = Vocabulary.of(tokenizer)
        for token in tokenizer.encode("東京 café"):
            shown = tokenizer.decode([token])
            assert vocabulary.id_of(shown) == (None if "�" in shown else token)
        assert vocabulary.id_of("whatever", [0xE6]) == tokenizer.encode("東")[0]
        assert vocabulary.id_of(" the") == vocabulary.id_of("x", list(b" the")) == tokenizer.encode(" the")[0]
        assert vocabulary.id_of("<|im_end|>") == tokenizer.eos_token_id
        assert vocabulary.id_of("no such token") is None

    def test_a_string_that_two_tokens_decode_to_is_none(self) -> None:
        class Pieces:
            """As SentencePiece: a leading space is lost when a token is decoded alone."""

            all_special_ids = ()

            def get_vocab(self) -> dict[str, int]:
                return {"\u2581the": 0, "the": 1, "<0x41>": 2, "cat": 3}

            def batch_decode(self, ids: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
                assert not skip_special_tokens
                return [["the", "the", "A", "cat"][i] for (i,) in ids]

        vocabulary = Vocabulary.of(Pieces())
        found = {text: vocabulary.id_of(text) for text in ("the", " the", "A", "cat")}
        assert found == {"the": None, " the": 0, "A": 2, "cat": 3}

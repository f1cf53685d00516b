"""What a run reads: the same sequences in the same order from a cache and beside a live teacher."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.training.holdout import Holdout
from pipeline.training.source import Source
from pipeline.training.text_reader import row_groups
from pmetal_distill.models import load_model, model_fingerprint
from pmetal_distill.offline.reader import LogitCache
from schemas.errors import IncompatibleError, UsageError
from tests.pipeline.training.sources import make_cache, offline, online, source_of
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def cache(tiny_teacher: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tiny_teacher, text_file, tmp_path_factory.mktemp("source") / "cache")


def texts(source: Source, count: int, **options: Any) -> list[dict[str, np.ndarray]]:
    """Everything about the text of some batches."""
    options = {"batch_size": 5, "seed": 3} | options
    with source.batches(**options) as batches:
        return [
            {name: getattr(b, name) for name in ("numbers", "token_ids", "documents", "loss_mask", "labels")}
            for b in islice(batches, count)
        ]


def assert_same(first: list[dict[str, np.ndarray]], second: list[dict[str, np.ndarray]]) -> None:
    for one, two in zip(first, second, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def read(source: Source, **options: Any) -> set[int]:
    """Numbers of the sequences of a few epochs."""
    count = 3 * len(source.reader.numbers) // 5
    return {n for batch in texts(source, count, **options) for n in batch["numbers"].tolist()}


class TestOrder:
    @pytest.mark.parametrize("share", [0.0, 0.1])
    def test_a_live_teacher_and_a_cache_give_the_same_batches(
        self, cache: Path, tiny_teacher: Path, tiny_student: Path, text_file: Path, share: float
    ) -> None:
        cached = source_of(offline(cache, tiny_student, val_share=share))
        live = source_of(online(tiny_teacher, text_file, tiny_student, val_share=share))
        assert len(LogitCache(cache).shards) > 1
        epochs = 2 * len(cached.reader.numbers) // 5
        first = texts(cached, epochs)
        assert_same(first, texts(live, epochs))
        assert sorted(first[0]["numbers"]) != list(range(5))
        held_out = [list(source.validation_batches(4, -1)) for source in (cached, live)]
        assert [b.token_ids.tolist() for b in held_out[0]] == [b.token_ids.tolist() for b in held_out[1]]

    def test_caches_of_one_text_are_read_in_one_order(
        self, cache: Path, tiny_teacher: Path, tiny_student: Path, text_file: Path, tmp_path: Path
    ) -> None:
        other = make_cache(tiny_teacher, text_file, tmp_path / "c", tail="none", top_k=3)
        sources = [source_of(offline(folder, tiny_student)) for folder in (cache, other)]
        assert_same(texts(sources[0], 40), texts(sources[1], 40))
        assert sources[0].root != sources[1].root

    def test_a_live_run_goes_on_from_a_state_of_a_few_numbers(
        self, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        source = source_of(online(tiny_teacher, text_file, tiny_student))
        whole = texts(source, 60)
        with source.batches(batch_size=5, seed=3, prefetch=3) as batches:
            for _ in range(37):
                next(batches)
            state = batches.get_state()
        assert len(str(state)) < 300
        assert_same(texts(source, 23, state=state), whole[37:])
        with pytest.raises(IncompatibleError, match="seed must be 4"):
            source.batches(batch_size=5, seed=4, state=state)

    @pytest.mark.parametrize("lengths", [[3] * 11, [4, 4, 1, 9, 2, 2, 2, 2, 2, 7], [5]])
    def test_row_groups_end_where_the_writer_ends_them(self, lengths: list[int], tmp_path: Path) -> None:
        from pmetal_distill.offline.writer import CacheWriter, CapturedSequence
        from schemas.manifest import Dataset
        from tests.pmetal_distill.offline import caches

        spec = caches.SPEC
        dataset = Dataset(caches.FINGERPRINT, spec, len(lengths), sum(lengths), 4, 9, 6, None)
        targets = caches.make_sequence(caches.make_dataset(num_sequences=50), 0).targets
        with CacheWriter.create_or_resume(tmp_path / "c", dataset, caches.TOKENIZER) as writer:
            for shard in range(dataset.num_shards):
                sequences = [
                    CapturedSequence(
                        np.zeros(n, np.int32), np.zeros(n, np.int32), np.ones(n, np.bool_), _rows(targets, n)
                    )
                    for n in (lengths[i] for i in dataset.shard_range(shard))
                ]
                writer.write_shard(shard, iter(sequences), **caches.sidecars(dataset))
        groups = LogitCache(tmp_path / "c")._index.members()
        found = row_groups(np.array(lengths), per_shard=4, rows_per_group=6)
        assert [g.tolist() for g in found] == [g.tolist() for g in groups]


def _rows(targets: Any, count: int) -> Any:
    return targets[np.arange(count) % targets.leading[0]]


class TestHoldout:
    @pytest.mark.parametrize("kind", ["cache", "live"])
    def test_training_never_sees_what_is_held_out(
        self, kind: str, cache: Path, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        if kind == "cache":
            source = source_of(offline(cache, tiny_student, val_share=0.2))
        else:
            source = source_of(online(tiny_teacher, text_file, tiny_student, val_share=0.2))
        held_out = {n for b in source.validation_batches(3, -1) for n in b.numbers.tolist()}
        everything = set(source.reader.numbers.tolist())
        assert len(held_out) == round(0.2 * len(everything))
        for seed in (0, 1):
            assert read(source, seed=seed) == everything - held_out

    def test_validation_batches_are_spread_and_always_the_same(self, cache: Path, tiny_student: Path) -> None:
        source = source_of(offline(cache, tiny_student, val_share=0.5))
        first, again = ([b.numbers.tolist() for b in source.validation_batches(4, 3)] for _ in range(2))
        assert first == again
        assert [len(numbers) for numbers in first] == [4, 4, 4]
        assert first[-1][-1] == source.split.held_out[-1]
        assert list(source_of(offline(cache, tiny_student)).validation_batches(4, 3)) == []

    def test_the_split_depends_on_seed_and_text_alone(self) -> None:
        numbers = np.arange(50)
        one = Holdout.of(numbers, share=0.1, seed=1, text="a")
        assert len(one.held_out) == 5
        same = Holdout.of(numbers, share=0.1, seed=1, text="a").held_out
        np.testing.assert_array_equal(one.held_out, same)
        for seed, text in ((2, "a"), (1, "b")):
            other = Holdout.of(numbers, share=0.1, seed=seed, text=text)
            assert other.held_out.tolist() != one.held_out.tolist()

    def test_at_least_one_is_held_out_and_one_is_left(self) -> None:
        assert len(Holdout.of(np.arange(50), share=1e-6, seed=0, text="a").held_out) == 1
        with pytest.raises(UsageError, match=r"val_share.*found 0\.9 of 3 sequences"):
            Holdout.of(np.arange(3), share=0.9, seed=0, text="a")


class TestFacts:
    def test_both_kinds_name_teacher_and_data(
        self, cache: Path, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        cached = source_of(offline(cache, tiny_student)).describe()
        live = source_of(online(tiny_teacher, text_file, tiny_student)).describe()
        assert (
            cached["teacher_sha256"] == live["teacher_sha256"] == model_fingerprint(load_model(tiny_teacher))
        )
        assert cached["data_sha256"] == live["data_sha256"]
        assert (cached["targets"], live["targets"]) == ("cached: bucket, k=8", "live teacher")
        assert all(isinstance(value, str) and value for value in (*cached.values(), *live.values()))

    def test_the_root_changes_with_everything_that_matters(
        self, cache: Path, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        live = {"teacher": tiny_teacher, "data": text_file, "student": tiny_student}
        runs = [
            offline(cache, tiny_student),
            offline(cache, tiny_student, tail="none"),
            offline(cache, tiny_student, val_share=0.1),
            offline(cache, tiny_student, val_share=0.1, seed=1),
            online(**live),
            online(**live, max_seq_len=32),
            online(**live, hidden_loss="mse", hidden_layers=(1,)),
            online(**(live | {"teacher": tiny_student})),
        ]
        roots = [source_of(run).root for run in runs]
        assert len(set(roots)) == len(roots)
        assert source_of(runs[0]).root == roots[0]
        assert source_of(runs[4]).root == roots[4]


class TestRefusals:
    def test_hidden_layers_that_a_live_teacher_lacks(
        self, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        def layers(*wanted: int) -> tuple[int, ...]:
            run = online(tiny_teacher, text_file, tiny_student, hidden_loss="mse", hidden_layers=wanted)
            return source_of(run).hidden_layers

        assert layers(0, -1) == (0, 3)
        with pytest.raises(UsageError, match="among the 4 layers"):
            layers(4)
        every = online(tiny_teacher, text_file, tiny_student, hidden_loss="mse")
        assert source_of(every).hidden_layers == (0, 1, 2, 3)

    def test_a_student_with_another_tokenizer(
        self, cache: Path, tiny_teacher: Path, text_file: Path, tmp_path: Path
    ) -> None:
        stranger = build_tiny_model(tmp_path / "s", vocab_size=320, tokenizer_size=300)
        for run in (offline(cache, stranger), online(tiny_teacher, text_file, stranger)):
            with pytest.raises(IncompatibleError, match="must have the tokenizer"):
                source_of(run)

    def test_a_tail_beside_a_live_teacher(
        self, tiny_teacher: Path, tiny_student: Path, text_file: Path
    ) -> None:
        with pytest.raises(UsageError, match="tail: a live teacher"):
            source_of(online(tiny_teacher, text_file, tiny_student, tail="bucket"))

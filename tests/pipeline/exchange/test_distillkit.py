"""DistillKit's data sets: decoded as its own code decodes them, row by row beside the right token.

The files in golden/ were written by DistillKit's compressor from the tiny teacher's logits.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.exchange.distillkit import open_distillkit
from pmetal_distill.offline.reader import LogitCache
from tests.pipeline.conftest import Cli, Outcome
from tests.pipeline.exchange.conftest import assert_same_targets, own_cache
from tests.pipeline.exchange.golden.make_distillkit import CONFIGS, TEXTS

GOLDEN = Path(__file__).parent / "golden" / "distillkit"
# DistillKit rounds sums to float16 where exact values are float16; ours are not rounded again.
ROUNDING = {"bins": 2e-3}


@pytest.fixture
def run(cli: Cli, tiny_teacher: Path, tmp_path: Path) -> Any:
    def go(source: Path, *words: object) -> Outcome:
        return cli(
            *("import", "distillkit", source, "--out", tmp_path / "c", "--tokenizer", tiny_teacher),
            *("--teacher-name", "tiny", "--json", *words),
        )

    return go


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_of_distillkits_own_decoder(name: str) -> None:
    expected = np.load(GOLDEN / "expected.npz")
    for number, sequence in enumerate(open_distillkit(GOLDEN / name, None).sequences()):
        ids = expected[f"{name}_ids{number}"].astype(int)
        logprobs = expected[f"{name}_logprobs{number}"].astype(np.float64)
        if name == "legacy":
            logprobs -= np.log(np.exp(logprobs).sum(axis=1, keepdims=True))
        dense = np.full((len(ids), 320), -np.inf)
        np.put_along_axis(dense, ids, logprobs, axis=1)
        on = sequence.loss_mask
        assert on.tolist() == [True] * len(ids) + [False]
        got = np.full_like(dense, -np.inf)
        np.put_along_axis(got, sequence.said.ids[on], sequence.said.logprobs[on], axis=1)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(dense))
        np.testing.assert_allclose(
            got[np.isfinite(got)], dense[np.isfinite(dense)], atol=ROUNDING.get(name, 1e-5)
        )


def test_the_targets_are_those_of_our_own_cache(run: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    got = run(GOLDEN / "exact")
    assert got.code == 0, got.err
    assert (got.json["top_k"], got.json["tail"]) == (16, "bucket")
    assert_same_targets(tmp_path / "c", own_cache(tiny_teacher, TEXTS, tmp_path), k=16)


def test_approximations_are_as_close_as_they_were_kept(run: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    run(GOLDEN / "recommended")
    theirs, ours = LogitCache(tmp_path / "c"), LogitCache(own_cache(tiny_teacher, TEXTS, tmp_path))
    for number in range(2):
        a, b = theirs.sequence(number), ours.sequence(number)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
        for row in np.flatnonzero(a.loss_mask):
            kept = dict(zip(a.targets.head_ids[row], a.targets.head_logprobs[row], strict=True))
            exact = zip(b.targets.head_ids[row], b.targets.head_logprobs[row], strict=True)
            assert max(abs(kept[token] - logprob) for token, logprob in exact) < 0.03


def test_legacy_values_have_no_known_total(run: Any, tmp_path: Path) -> None:
    got = run(GOLDEN / "legacy")
    assert (got.json["tail"], got.json["top_k"]) == ("none", 32)
    assert "never recorded" in got.json["lost"]
    assert run(GOLDEN / "legacy", "--tail", "bucket", "--out", tmp_path / "d").code == 2


def packed_table(**extra: Any) -> pa.Table:
    """Both documents in one row, cut to the rows they have, as `pack_logits` does it."""
    table = pq.read_table(GOLDEN / "exact" / "data_0.parquet")
    rows = table.to_pylist()
    lists = ("compressed_logprobs", "bytepacked_indices")
    joined: dict[str, list[Any]] = {name: [] for name in ("input_ids", *lists, "attention_mask")}
    for document, row in enumerate(rows, start=1):
        kept = len(row["compressed_logprobs"])
        joined["input_ids"] += row["input_ids"][:kept]
        joined["attention_mask"] += [document] * kept
        for name in lists:
            joined[name] += row[name]
    schema = table.schema.append(pa.field("attention_mask", pa.list_(pa.int64())))
    for name in extra:
        schema = schema.append(pa.field(name, pa.list_(pa.int64())))
    return pa.Table.from_pylist([joined | extra], schema)


def packed_folder(tmp_path: Path, table: pa.Table, *, arrow: bool = False) -> Path:
    folder = tmp_path / "packed"
    folder.mkdir()
    shutil.copy(GOLDEN / "exact" / "compression_config.yaml", folder)
    if arrow:
        with (
            pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    else:
        pq.write_table(table, folder / "part-0.parquet")
    return folder


@pytest.mark.parametrize("arrow", [False, True])
def test_packed_documents_stay_apart(run: Any, tiny_teacher: Path, tmp_path: Path, arrow: bool) -> None:
    got = run(packed_folder(tmp_path, packed_table(), arrow=arrow))
    assert got.code == 0, got.err
    row = LogitCache(tmp_path / "c").sequence(0)
    ours = LogitCache(own_cache(tiny_teacher, TEXTS, tmp_path))
    parts = [ours.sequence(number) for number in range(2)]
    lengths = [len(part) - 1 for part in parts]
    assert row.documents.tolist() == [0] * lengths[0] + [1] * lengths[1]
    assert row.loss_mask.all()
    want = np.concatenate([part.targets.head_ids[:-1] for part in parts])
    np.testing.assert_array_equal(row.targets.head_ids[:, :15], want[:, :15])
    np.testing.assert_array_equal(row.token_ids, np.concatenate([part.token_ids[:-1] for part in parts]))


def test_padding_and_labels_leave_rows_out(run: Any, tmp_path: Path) -> None:
    table = packed_table()
    (row,) = table.to_pylist()
    count = len(row["input_ids"])
    row["attention_mask"] = [n if i < count - 4 else 0 for i, n in enumerate(row["attention_mask"])]
    row["labels"] = [-100 if i < 10 else token for i, token in enumerate(row["input_ids"])]
    schema = table.schema.append(pa.field("labels", pa.list_(pa.int64())))
    run(packed_folder(tmp_path, pa.Table.from_pylist([row], schema)))
    got = LogitCache(tmp_path / "c").sequence(0)
    assert len(got) == count - 4
    assert got.loss_mask.tolist() == [False] * 9 + [True] * (count - 13)


class TestRefusals:
    def test_a_configuration_is_needed_and_must_fit(self, run: Any, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        shutil.copy(GOLDEN / "exact" / "data_0.parquet", bare)
        assert "--compression-config" in run(bare).err
        wrong = GOLDEN / "delta" / "compression_config.yaml"
        got = run(bare, "--compression-config", wrong)
        assert got.code == 1
        assert "data_0.parquet:1: rows must have widths" in got.err
        right = tmp_path / "run.yaml"
        inner = (GOLDEN / "exact" / "compression_config.yaml").read_text().replace("\n", "\n    ")
        right.write_text(f"project_name: x\nteacher:\n  kind: dataset\n  logprob_compressor:\n    {inner}\n")
        assert run(bare, "--compression-config", right).code == 0

    @pytest.mark.parametrize(
        "text",
        [
            "k: 3\n",
            "a: [1\n",
            "k: 5000\nexact_k: 1\nd: 9\nresidual_bins: []\n",
            "polynomial_degree: 99999999\n",
        ],
    )
    def test_bad_configurations(self, run: Any, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.yaml").write_text(text)
        got = run(GOLDEN / "exact", "--compression-config", tmp_path / "x.yaml")
        assert got.code == 2
        assert "x.yaml" in got.err

    def test_damaged_data(self, run: Any, tmp_path: Path) -> None:
        folder = packed_folder(tmp_path, packed_table())
        (folder / "part-0.parquet").write_bytes(b"PAR1 nothing PAR1")
        got = run(folder)
        assert got.code == 1
        assert "part-0.parquet: must be readable" in got.err

    @pytest.mark.parametrize("column", ["input_ids", "compressed_logprobs"])
    def test_lengths_that_do_not_fit(self, run: Any, tmp_path: Path, column: str) -> None:
        table = packed_table()
        (row,) = table.to_pylist()
        row[column] = row[column][:-3]
        got = run(packed_folder(tmp_path, pa.Table.from_pylist([row], table.schema)))
        assert got.code == 1
        assert "part-0.parquet:1" in got.err

    def test_values_that_are_no_bytes(self, run: Any, tmp_path: Path) -> None:
        table = packed_table()
        (row,) = table.to_pylist()
        row["bytepacked_indices"][0][0] = 300
        schema = table.schema.set(2, pa.field("bytepacked_indices", pa.list_(pa.list_(pa.int64()))))
        got = run(packed_folder(tmp_path, pa.Table.from_pylist([row], schema)))
        assert "packed lists must hold bytes" in got.err

import io
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import ALL_LEVELS, head_and_curve, random_basis, random_case, random_coordinates, random_logits

from schemas.arrays import TargetArrays
from schemas.basis import CoordinateGroup, plan_groups
from schemas.codec import Codec, decode, encode
from schemas.errors import CorruptionError, IncompatibleError, NonFiniteError
from schemas.grid import TOP_STEP, truncate_head
from schemas.layout import parquet_options
from schemas.packing import group_width, num_planes, pack_group, unpack_group
from schemas.spec import TargetSpec

SPECS = {
    "sketch": TargetSpec(vocab_size=300, k=8),
    "bucket": TargetSpec(vocab_size=66000, k=5, tail="bucket", curve_nodes=(0.25, 1.0)),
    "none": TargetSpec(vocab_size=200, k=200, tail="none"),
    "k=1": TargetSpec(vocab_size=50, k=1, tail="bucket"),
}

specs = st.builds(
    lambda vocab, k, tail, steps: TargetSpec(
        vocab, min(k, vocab - 1), tail, logprob_step=steps[0], curve_step=steps[1]
    ),
    st.sampled_from([20, 256, 257, 1000]),
    st.integers(1, 30),
    st.sampled_from(["sketch", "bucket", "none"]),
    st.sampled_from([(1 / 128, 1 / 256), (1 / 16, 0.01), (0.013, 0.02)]),
)


def through_parquet(table, codec):
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, codec.schema, **parquet_options(codec.schema)) as writer:
        writer.write_table(table)
    return pq.ParquetFile(io.BytesIO(sink.getvalue()), page_checksum_verification=True).read()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(specs, st.integers(0, 10**6), st.sampled_from([0.3, 3.0, 30.0]), st.booleans(), st.booleans())
def test_decode_of_encode_is_within_the_stated_bounds(spec, seed, scale, with_codebook, with_predictor):
    targets, rows, codec = random_case(
        spec, seed=seed, scale=scale, with_codebook=with_codebook, with_predictor=with_predictor
    )
    table, saturation = encode(targets, rows, codec)
    got_rows, got = decode(through_parquet(table, codec), codec)
    on = rows.loss_mask
    for name in ("token_ids", "sequences", "documents", "loss_mask"):
        np.testing.assert_array_equal(getattr(got_rows, name), getattr(rows, name))
    np.testing.assert_array_equal(got.head_ids[on], targets.head_ids[on])
    assert saturation.tokens == on.sum()
    assert saturation.logprobs == saturation.coordinates == 0

    exact = targets.head_logprobs.astype(np.float64)
    below, got_below = exact - exact[:, :1], got.head_logprobs - got.head_logprobs[:, :1]
    rounding = 1e-5 + 4e-7 * np.abs(exact)
    assert (np.abs(got_below - below)[on] <= spec.logprob_step / 2 + rounding[on]).all()
    bound = (
        spec.logprob_step + spec.curve_step / 2 if spec.num_nodes else TOP_STEP / 2 + spec.logprob_step / 2
    )
    assert (np.abs(got.head_logprobs - exact)[on] <= bound + rounding[on]).all()
    if saturation.curve == 0:
        shift = (below[:, -1:] - got_below[:, -1:]) * np.array(spec.curve_nodes)
        assert (np.abs(got.tail_curve - targets.tail_curve - shift)[on] <= spec.curve_step / 2 + 1e-4).all()
    if codec.basis:
        assert (np.abs(got.coordinates - targets.coordinates)[on] <= codec.basis.step * 0.5001).all()
    assert not any(part[~on].any() for part in got.parts())


def test_a_smaller_head_keeps_the_predictions_of_the_whole_one():
    targets, rows, codec = random_case(SPECS["sketch"], with_predictor=True)
    table, _ = encode(targets, rows, codec)
    np.testing.assert_array_equal(
        decode(table, codec, k=2)[1].coordinates, decode(table, codec)[1].coordinates
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_probabilities_sum_to_one(spec):
    targets, rows, codec = random_case(spec, num_tokens=12, masked=0)
    _, got = decode(encode(targets, rows, codec)[0], codec)
    total = np.exp(got.head_logprobs.astype(np.float64)).sum(1)
    if spec.num_nodes:
        total += np.exp(got.head_logprobs[:, -1] + got.tail_curve[:, -1].astype(np.float64))
    assert total == pytest.approx(np.ones(len(rows)), abs=1e-6 if spec.num_nodes else 0.01)


@pytest.mark.parametrize("with_predictor", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_decoding_twice_encodes_to_the_same_bytes(spec, with_predictor):
    """The grid is a fixed point: encode(decode(x)) == x, so nothing drifts when a cache is rewritten."""
    targets, rows, codec = random_case(spec, num_tokens=12, with_codebook=True, with_predictor=with_predictor)
    table, _ = encode(targets, rows, codec)
    again, _ = encode(decode(table, codec)[1], rows, codec)
    if spec.tail == "none":
        table, again = (t.drop_columns(["top0", "top1"]) for t in (table, again))
    assert again.equals(table)


def test_permuting_tokens_commutes_with_the_codec():
    targets, rows, codec = random_case(SPECS["sketch"], num_tokens=600, with_predictor=True)
    order = np.random.default_rng(5).permutation(len(rows))
    _, straight = decode(encode(targets, rows, codec)[0], codec)
    _, permuted = decode(encode(targets[order], rows[order], codec)[0], codec)
    for a, b in zip(straight[order].parts(), permuted.parts(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["sketch", "bucket", "none"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_a_smaller_head_is_the_target_of_the_same_logits_with_that_head(name, k):
    spec = SPECS[name]
    logits = random_logits(12, spec.vocab_size, seed=3)
    targets, rows, codec = random_case(spec, num_tokens=12, seed=3, masked=0)
    rows_full, full = decode(encode(targets, rows, codec)[0], codec)
    _, got = decode(encode(targets, rows, codec)[0], codec, k=k)
    for a, b in zip(got.parts(), truncate_head(full, spec, k).parts(), strict=True):
        np.testing.assert_array_equal(a, b)
    ids, _, curve = head_and_curve(logits, spec.with_k(k))
    np.testing.assert_array_equal(got.head_ids, ids)
    np.testing.assert_array_equal(got.head_ids, full.head_ids[:, :k])
    np.testing.assert_array_equal(got.head_logprobs, full.head_logprobs[:, :k])
    assert got.tail_curve == pytest.approx(curve, abs=2 * spec.logprob_step + spec.curve_step)
    assert len(rows_full) == 12


@pytest.mark.parametrize("with_predictor", [False, True])
@pytest.mark.parametrize("rank", range(ALL_LEVELS[-1].stop + 1))
def test_a_smaller_rank_is_a_prefix_and_needs_fewer_columns(rank, with_predictor):
    targets, rows, codec = random_case(SPECS["sketch"], with_predictor=with_predictor)
    table, _ = encode(targets, rows, codec)
    _, full = decode(table, codec)
    _, got = decode(table.select(codec.columns(rank=rank)), codec, rank=rank)
    np.testing.assert_array_equal(got.coordinates, full.coordinates[:, :rank])
    np.testing.assert_array_equal(got.head_logprobs, full.head_logprobs)
    assert len(codec.columns(rank=rank)) <= len(codec.columns())


def test_extreme_logits_saturate_at_the_stated_floor_and_stay_a_distribution():
    spec = TargetSpec(vocab_size=40, k=4, tail="bucket")
    logits = np.zeros((3, 40))
    logits[0, :2] = 1e4, -1e4
    logits[1] = np.linspace(1e4, -1e4, 40)
    logits[2, 0] = 450.0
    targets = TargetArrays(*head_and_curve(logits, spec), np.zeros((3, 0), np.float32))
    _, rows, _ = random_case(spec, num_tokens=3, masked=0)
    table, saturation = encode(targets, rows, Codec(spec))
    _, got = decode(table, Codec(spec))
    floor = -65535 * spec.logprob_step
    expected = np.maximum(targets.head_logprobs, floor)
    assert got.head_logprobs == pytest.approx(expected, abs=spec.logprob_step)
    assert saturation.logprobs == 6
    assert got.tail_curve[2] == pytest.approx(targets.tail_curve[2], abs=spec.curve_step)
    assert np.isfinite(truncate_head(got, spec, 1).tail_curve).all()


def test_clipped_coordinates_are_counted():
    basis = random_basis(300)
    spec = SPECS["sketch"]
    targets, rows, codec = random_case(spec, masked=0)
    wide = random_coordinates(len(rows), basis, over=2.0)
    _, saturation = encode(replace_coordinates(targets, wide), rows, codec)
    steps = np.rint(wide / basis.step)
    largest = np.concatenate([[g.largest] * (g.stop - g.start) for g in basis.groups])
    assert saturation.coordinates == (np.abs(steps) > largest).sum() > 0


def replace_coordinates(targets, coordinates):
    return TargetArrays(targets.head_ids, targets.head_logprobs, targets.tail_curve, coordinates)


@pytest.mark.parametrize("levels", [3, 5, 15, 255, 65536])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 11])
def test_packing_holds_every_value(levels, width):
    group = CoordinateGroup(0, width, levels)
    largest = group.largest
    values = np.random.default_rng(0).integers(-largest, largest + 1, (400, width)).astype(np.int32)
    values[0], values[1], values[2] = largest, -largest, 0
    planes = [np.empty((400, group_width(group)), np.uint8) for _ in range(num_planes(levels))]
    pack_group(values, levels, planes)
    assert not any(p[2].any() for p in planes)
    for kept in range(1, width + 1):
        out = np.empty((400, kept), np.float32)
        unpack_group(planes, group, out, step=1.0)
        np.testing.assert_array_equal(out, values[:, :kept])


@pytest.mark.parametrize("with_predictor", [False, True])
def test_masked_rows_are_stored_as_zeros(with_predictor):
    targets, rows, codec = random_case(SPECS["sketch"], masked=1.0, with_predictor=with_predictor)
    table, _ = encode(targets, rows, codec)
    for name in table.schema.names:
        if name not in ("seq", "doc", "msk", "tok0", "tok1"):
            assert set(table.column(name).to_pylist()) == {bytes(table.schema.field(name).type.byte_width)}


@pytest.mark.parametrize("with_predictor", [False, True])
def test_nothing_of_a_masked_row_is_looked_at(with_predictor):
    targets, rows, codec = random_case(SPECS["sketch"], masked=0.5, with_predictor=with_predictor)
    clean, _ = encode(targets, rows, codec)
    dirty = [a.copy() for a in targets.parts()]
    for a in dirty:
        a[~rows.loss_mask] = -5 if a.dtype == np.int32 else np.nan
    assert encode(TargetArrays(*dirty), rows, codec)[0].equals(clean)


@pytest.mark.parametrize("part", ["head_logprobs", "tail_curve", "coordinates"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite(part, value):
    targets, rows, codec = random_case(SPECS["sketch"], masked=0)
    getattr(targets, part)[7, 0] = value
    with pytest.raises(NonFiniteError, match=rf"encode row 7 \(sequence 0, token 7\): {part} must be finite"):
        encode(targets, rows, codec)


def test_refuses_wrong_input():
    targets, rows, codec = random_case(SPECS["sketch"], masked=0)
    with pytest.raises(IncompatibleError, match="must have shapes"):
        encode(replace_coordinates(targets, targets.coordinates[:, :-1]), rows, codec)
    with pytest.raises(IncompatibleError, match=r"token_ids must be below V=300, found 0\.\.300"):
        encode(targets, replace(rows, token_ids=np.r_[rows.token_ids[1:] * 0, 300].astype(np.int32)), codec)
    rising = targets.head_logprobs[:, ::-1].copy()
    with pytest.raises(
        IncompatibleError, match=r"encode row 0 \(sequence 0, token 0\): head_logprobs must not rise"
    ):
        encode(TargetArrays(targets.head_ids, rising, *targets.parts()[2:]), rows, codec)
    with pytest.raises(IncompatibleError, match="a basis must come with tail 'sketch' only, found none"):
        Codec(SPECS["sketch"])
    with pytest.raises(IncompatibleError, match="basis must have V=300, found V=40"):
        Codec(SPECS["sketch"], random_basis(40))
    with pytest.raises(IncompatibleError, match="codebook must have the vocabulary"):
        Codec(SPECS["bucket"], None, codec.codebook)


def test_decode_refuses_what_encode_never_writes():
    targets, rows, codec = random_case(SPECS["sketch"], masked=0)
    table, _ = encode(targets, rows, codec)
    with pytest.raises(CorruptionError, match=r"column 'gap1' must be fixed_size_binary\[7\], found none"):
        decode(table.drop_columns(["gap1"]), codec)
    with pytest.raises(CorruptionError, match="column 'id1' must be"):
        decode(table.set_column(table.schema.get_field_index("id1"), "id1", table.column("gap1")), codec)
    high = table.set_column(table.schema.get_field_index("id1"), "id1", table.column("id0"))
    with pytest.raises(CorruptionError, match="head ids must be below V=300"):
        decode(high, codec)
    with pytest.raises(IncompatibleError, match="rank must be from 0 to the stored 29, found 30"):
        decode(table, codec, rank=30)
    with pytest.raises(IncompatibleError, match="k must be from 1 to the stored 8, found 9"):
        decode(table, codec, k=9)


def test_groups_follow_the_spread_and_cover_it():
    spread = np.array([1e5, 20.0, 30.0, 3.0, 1.0, 0.5, 0.2, 0.4])
    groups = plan_groups(spread, step=1.0)
    assert [(g.start, g.stop, g.levels) for g in groups] == [
        (0, 1, 65536), (1, 4, 255), (4, 5, 15), (5, 6, 5), (6, 8, 3)
    ]  # fmt: skip
    for g in groups[1:]:
        assert (spread[g.start : g.stop] * 3.1 <= g.largest + 0.5).all()

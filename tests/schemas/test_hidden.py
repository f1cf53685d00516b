import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import CorruptionError, IncompatibleError, NonFiniteError
from schemas.hidden import (
    HiddenBasis,
    HiddenCodec,
    decode_hidden,
    encode_hidden,
)
from schemas.hidden_spec import HiddenSpec


def states_of(spec, num_tokens=30, *, seed=0, scale=10.0):
    rng = np.random.default_rng(seed)
    return {
        i: (rng.standard_t(3, (num_tokens, spec.hidden_size)) * scale).astype(np.float32) for i in spec.layers
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 70), st.sampled_from([1, 7, 64]), st.sampled_from([1e-6, 1.0, 300.0]), st.integers(0, 99)
)
def test_int8_is_within_half_a_step_of_each_group(width, group, scale, seed):
    spec = HiddenSpec((0, 5), width, group_size=group)
    states, mask = states_of(spec, seed=seed, scale=scale), np.arange(30) % 4 != 0
    codec = HiddenCodec(spec)
    got = decode_hidden(encode_hidden(states, mask, codec), codec, (5,))
    for start in range(0, width, group):
        exact, back = states[5][mask, start : start + group], got[5][mask, start : start + group]
        step = np.abs(exact).max(axis=1, keepdims=True) / 127 * 1.001 + 6e-8
        assert (np.abs(back - exact) <= step / 2 * 1.01).all()
    assert not got[5][~mask].any()
    assert list(got) == [5]


def test_float16_is_the_nearest():
    spec = HiddenSpec((2,), 9, encoding="float16")
    states, mask = states_of(spec), np.ones(30, np.bool_)
    got = decode_hidden(encode_hidden(states, mask, HiddenCodec(spec)), HiddenCodec(spec), (2,))
    np.testing.assert_array_equal(got[2], states[2].astype(np.float16))


def test_rank_keeps_what_lies_in_the_span():
    rng = np.random.default_rng(0)
    spec = HiddenSpec((1, 4), 24, rank=6)
    plain = {
        i: (rng.normal(size=(400, 6)) @ rng.normal(size=(6, 24)) + 3).astype(np.float32) for i in spec.layers
    }
    basis = HiddenBasis.fit(plain, spec)
    codec = HiddenCodec(spec, basis)
    table = encode_hidden(plain, np.ones(400, np.bool_), codec)
    assert table.schema.field("h1").type.byte_width == 6
    got = decode_hidden(table, codec, (1, 4))
    for layer in spec.layers:
        assert np.abs(got[layer] - plain[layer]).max() < 0.02 * np.abs(plain[layer]).max()
    data = basis.to_bytes()
    np.testing.assert_array_equal(HiddenBasis.from_bytes(data, where="it").components, basis.components)
    with pytest.raises(CorruptionError, match=r"^it"):
        HiddenBasis.from_bytes(data[:-1], where="it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "ascending layers"),
        ({"layers": (3, 1)}, "ascending layers"),
        ({"layers": (-1,)}, "'layers': must be"),
        ({"encoding": "int4"}, "one of int8, float16"),
        ({"rank": 25}, "rank <= hidden_size 24"),
        ({"group_size": 0}, "'group_size'"),
    ],
)
def test_refuses_a_bad_spec(change, message):
    with pytest.raises(IncompatibleError, match=message):
        HiddenSpec(**({"layers": (1,), "hidden_size": 24} | change))


def test_refuses_wrong_input():
    spec = HiddenSpec((1, 2), 8)
    codec, mask = HiddenCodec(spec), np.ones(30, np.bool_)
    states = states_of(spec)
    with pytest.raises(IncompatibleError, match=r"layer 2 must have shape \(30, 8\), found none"):
        encode_hidden({1: states[1]}, mask, codec)
    for value in (np.nan, np.inf, 1e5):
        bad = {1: states[1], 2: states[2].copy()}
        bad[2][9, 3] = value
        with pytest.raises(NonFiniteError, match="hidden layer 2 row 9: values must be finite"):
            encode_hidden(bad, mask, codec)
        mask[9] = False
        encode_hidden(bad, mask, codec)
        mask[9] = True
    table = encode_hidden(states, mask, codec)
    with pytest.raises(IncompatibleError, match=r"must be among the stored \(1, 2\), found \[3\]"):
        decode_hidden(table, codec, (3,))
    with pytest.raises(CorruptionError, match="column 's2' must be"):
        decode_hidden(table.drop_columns(["s2"]), codec, (2,))
    with pytest.raises(IncompatibleError, match="a basis must come with rank > 0 only"):
        HiddenCodec(HiddenSpec((1,), 8, rank=2))

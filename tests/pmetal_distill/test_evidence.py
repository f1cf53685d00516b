"""Checks of a model's parts in every type: what rounding does passes, leaks and wrong parts do not."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from pmetal_distill.modelling.evidence import Evidence, Probe, unit_roundoff, vocabulary
from pmetal_distill.models import load_model, wrap_model
from schemas.errors import ModelError
from tests.precision import TYPES, deafen, deep, lower
from tests.tiny import random_model, tiny_config
from tests.zoo import SPLIT, UNPACKED


class TestProbe:
    @pytest.mark.parametrize("size", [8, 320, 49152, 152064])
    def test_documents_differ_wherever_they_are_compared(self, size: int) -> None:
        probe = Probe.below(size)
        rows, documents = np.array(probe.rows), np.array(probe.documents)
        assert rows.min() >= size // 16
        assert rows.max() < size - size // 16
        a, c, b = rows[0, :4], rows[1, :4], np.array(probe.alone)[0]
        assert (a != c).all()
        np.testing.assert_array_equal(rows[:2, 4:], [b, b])
        np.testing.assert_array_equal(rows[2, :8], b)
        np.testing.assert_array_equal(documents[:2], [[0] * 4 + [1] * 8] * 2)
        np.testing.assert_array_equal(documents[2], [0] * 8 + [1] * 4)
        assert len(np.unique(b)) >= min(size, 8) - 2
        if size > 320:
            assert len(np.unique(rows)) == 20
            assert np.diff(np.sort(np.unique(rows))).max() < size / 8

    def test_the_vocabulary_is_the_smallest_named(self) -> None:
        assert vocabulary({"vocab_size": 320}) == 320
        assert vocabulary({"text_config": {"vocab_size": 99}, "vision_config": {"depth": 3}}) == 99
        assert vocabulary({"vocab_size": 500, "text_config": {"vocab_size": 99}}) == 99
        assert vocabulary({}) == 8

    def test_a_vocabulary_of_eight(self) -> None:
        config = tiny_config(vocab_size=8)
        assert wrap_model(random_model(config), None, config).notes == ()


class TestManyLayers:
    @pytest.mark.parametrize("kind", TYPES)
    def test_every_part_is_found(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, config = deep(kind, monkeypatch)
        loaded = wrap_model(model, None, config)
        assert loaded.notes == ()
        assert loaded.anatomy.packing == "batch"
        assert loaded.head is not None
        assert (loaded.head.path, loaded.head.scale, loaded.head.softcap) == ("lm_head", None, None)

    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize(
        "deaf", [slice(None), slice(1), slice(7, 8), slice(-1, None)], ids=["all", "first", "middle", "last"]
    )
    def test_layers_that_ignore_the_mask(self, kind: str, deaf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model, config = deep(kind, monkeypatch)
        for block in model.layers[deaf]:
            deafen(block)
        loaded = wrap_model(model, None, config)
        assert loaded.anatomy.packing == "none"
        assert loaded.splits

    @pytest.mark.parametrize("kind", ["float32", "bfloat16"])
    def test_noise_foretells_what_positions_do(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The residual, of roundings at other positions, lies within a factor of four of it."""
        model, config = deep(kind, monkeypatch)
        probe = Probe.below(320)
        evidence = Evidence.of(model, probe, model(probe.alone, cache=None))
        loaded = wrap_model(model, None, config)
        packed = evidence.packed(loaded.full(probe.rows, probe.documents))
        assert packed.leak == 0
        assert evidence.noise / 4 < packed.residual < 4 * evidence.noise
        assert evidence.leak > 0.3


class TestKinds:
    @pytest.mark.parametrize("kind", TYPES)
    @pytest.mark.parametrize(("name", "packing"), [("gemma2", "rows"), ("llama windows", "batch")])
    def test_row_by_row_and_in_windows(
        self, name: str, packing: str, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = tiny_config(model_type=name.split(" ")[0], **SPLIT[name][0])
        model = lower(random_model(config), kind, monkeypatch)
        assert wrap_model(model, None, config).anatomy.packing == packing
        # The first layer of the second has a window of 4, so that its leak reaches few tokens.
        deafen(model.layers[2], window=4 if packing == "batch" else None)
        assert wrap_model(model, None, config).anatomy.packing == "none"

    @pytest.mark.parametrize("kind", TYPES)
    def test_learned_positions_do_not_pack(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config(model_type="gpt2", **UNPACKED["gpt2"], num_layers=4)
        model = lower(random_model(config), kind, monkeypatch)
        assert wrap_model(model, None, config).anatomy.packing == "none"

    def test_roundoff_is_that_of_the_coarsest_type(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = random_model(tiny_config())
        logits = model(mx.array([[1, 2]]), cache=None)
        assert unit_roundoff(model, logits) == 2.0**-24
        model.layers[0].set_dtype(mx.bfloat16)
        assert unit_roundoff(model, logits) == 2.0**-8
        tf32 = lower(random_model(tiny_config()), "tf32", monkeypatch)
        assert unit_roundoff(tf32, logits) == 2.0**-11

    def test_no_more_passes_than_five(self) -> None:
        passes = []

        class Body(type(random_model(tiny_config()).model)):  # type: ignore[misc]
            def __call__(self, inputs: mx.array, *rest: Any, **named: Any) -> mx.array:
                passes.append(inputs.size)
                states: mx.array = super().__call__(inputs, *rest, **named)
                return states

        config = tiny_config()
        model = random_model(config)
        model.model.__class__ = Body
        wrap_model(model, None, config)
        assert sorted(passes) == [8, 8, 8, 36, 36]


class TestWrongParts:
    @pytest.mark.parametrize("kind", TYPES)
    def test_a_head_that_bends_is_no_matrix(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, config = deep(kind, monkeypatch)
        _change(model, lambda logits, _: logits + 0.1 * mx.sin(logits * 0.2) * 100)
        loaded = wrap_model(model, None, config)
        assert loaded.splits
        assert loaded.head is None

    @pytest.mark.parametrize("kind", TYPES)
    def test_a_head_that_reads_the_tokens_is_not_split_off(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, config = deep(kind, monkeypatch)
        spread = float(model(Probe.below(320).alone).astype(mx.float32).std())
        _change(model, lambda logits, ids: logits + spread * mx.sin(ids[..., None] + mx.arange(320)))
        assert not wrap_model(model, None, config).splits


def _change(model: Any, change: Any) -> None:
    class Changed(type(model)):  # type: ignore[misc]
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            logits = super().__call__(inputs, cache)
            changed: mx.array = change(logits, inputs).astype(logits.dtype)
            return changed

    model.__class__ = Changed


class TestCausality:
    @pytest.mark.parametrize("kind", TYPES)
    def test_an_encoder_is_refused(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, config = deep(kind, monkeypatch)
        for block in model.layers:
            _see_everything(block)
        with pytest.raises(
            ModelError,
            match=r"here: an output must not depend on later tokens, found that they change it by [\d.]+% "
            r"\(rounding would by at most [\d.]+%\); give a causal language model",
        ):
            wrap_model(model, None, config, source="here")

    def test_one_layer_that_looks_ahead_is_found(self) -> None:
        config = tiny_config(num_layers=30)
        model = random_model(config)
        _see_everything(model.layers[17])
        with pytest.raises(ModelError, match="depend on later tokens"):
            wrap_model(model, None, config)

    def test_dropout_is_no_sight_of_the_future(self) -> None:
        config = tiny_config()
        model = random_model(config)
        model.model.norm = nn.Sequential(model.model.norm, nn.Dropout(0.5))
        model.train()
        assert not wrap_model(model, None, config).supports_packing
        model.eval()
        assert wrap_model(model, None, config).supports_packing


def _see_everything(block: Any) -> None:
    class Encoder(type(block)):  # type: ignore[misc]
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            states: mx.array = super().__call__(x, None, cache)
            return states

    block.__class__ = Encoder


@pytest.mark.slow
class TestRealTeacher:
    @pytest.mark.parametrize(
        "kind",
        [
            "bfloat16",
            "4 bits",
            *(pytest.param(kind, marks=pytest.mark.faults) for kind in ("float16", "8 bits")),
        ],
    )
    def test_packs_and_its_leaks_are_found(
        self, real_teacher: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loaded = load_model(real_teacher)
        assert loaded.notes == ()
        model = lower(loaded.model, kind, monkeypatch)
        again = wrap_model(model, None, loaded.config)
        assert (again.notes, again.anatomy.packing) == ((), "batch")
        assert again.head is not None
        deafen(model.layers[28])  # of all layers the one that leaks least
        assert not wrap_model(model, None, loaded.config).supports_packing

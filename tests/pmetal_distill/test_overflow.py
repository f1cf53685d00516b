"""A float16 model that leaves its range says in which layer."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pmetal_distill.modelling.overflow import first_overflowing_layer
from pmetal_distill.models import wrap_model
from schemas.errors import ModelError
from tests.precision import near_the_edge
from tests.tiny import random_model, tiny_config

FATAL = 7


class TestOverflow:
    def test_the_first_layer_is_named(self) -> None:
        loaded = near_the_edge(FATAL, layer=2)
        assert loaded.splits
        assert first_overflowing_layer(loaded, mx.array([[5, FATAL, 6], [1, 2, 3]])) == 2
        assert first_overflowing_layer(loaded, mx.array([[5, 8, 6], [1, 2, 3]])) is None

    def test_in_packed_documents(self) -> None:
        loaded = near_the_edge(FATAL, layer=1)
        documents = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        assert first_overflowing_layer(loaded, mx.array([[1, 2, FATAL, 3], [1, 2, 3, 4]]), documents) == 1
        assert first_overflowing_layer(loaded, mx.array([[1, 2, 9, 3], [1, 2, 3, 4]]), documents) is None

    def test_wider_types_hold_it(self) -> None:
        for dtype in (mx.float32, mx.bfloat16):
            loaded = near_the_edge(FATAL, layer=2, dtype=dtype)
            assert first_overflowing_layer(loaded, mx.array([[FATAL, 2]])) is None

    def test_damaged_weights_are_no_overflow(self) -> None:
        loaded = near_the_edge(FATAL, layer=2)
        weights: Any = loaded.model.layers[1].mlp.up_proj
        weights.weight = weights.weight * float("nan")
        assert first_overflowing_layer(loaded, mx.array([[FATAL, 2]])) is None

    @pytest.mark.parametrize("layer", [0, 3])
    def test_a_model_that_overflows_on_any_text_is_refused(self, layer: int) -> None:
        config = tiny_config()
        model = random_model(config)
        model.layers[layer].mlp.down_proj.weight *= 1e4
        model.set_dtype(mx.float16)
        with pytest.raises(
            ModelError,
            match=rf"^here: layer {layer}: float16 overflows \(max 65504\); use --dtype bfloat16$",
        ):
            wrap_model(model, None, config, source="here")
        model.set_dtype(mx.bfloat16)
        assert wrap_model(model, None, config).notes == ()

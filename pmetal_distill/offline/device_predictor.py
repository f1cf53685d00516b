"""What token ids predict of sketch coordinates, taken off on the device. Costs 4 V r bytes there.

Encoding then only rounds and packs: the look-ups are most of its time, and a GPU makes them on the side.
"""

import mlx.core as mx

from schemas.arrays import Int32
from schemas.basis import SketchBasis
from schemas.predictor import SUBSTEPS


class DevicePredictor:
    """A basis' predictor in the device's memory. The sums are those of `PredictorTables.sums`.

    Args:
        basis: with a predictor.
    """

    def __init__(self, basis: SketchBasis) -> None:
        tables = basis.tables(basis.rank)
        assert tables is not None
        self._head, self._token = mx.array(tables.head), mx.array(tables.token)
        self._unit = basis.step / SUBSTEPS

    def residual(self, coordinates: mx.array, token_ids: Int32, head_ids: mx.array) -> mx.array:
        """Coordinates [n, r] less what is predicted, float32.

        Args:
            coordinates: float32 [n, r].
            token_ids: [n], input ids.
            head_ids: int32 [n, k].
        """
        sums = self._head[head_ids].sum(axis=1) + self._token[mx.array(token_ids)].astype(mx.int32)
        wrapped = sums.astype(mx.int16).astype(mx.float32)
        return coordinates - wrapped * self._unit

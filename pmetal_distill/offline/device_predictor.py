"""What token ids predict of sketch coordinates, taken off on the device. Costs 4 V r bytes there.

Encoding then only rounds and packs: the look-ups are most of its time, and a GPU makes them on the side.
"""

import mlx.core as mx

from pmetal_distill.host_inputs import to_device
from pmetal_distill.kernels.take_off import take_off
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
        self._head, self._token = to_device(tables.head), to_device(tables.token)
        self._unit = basis.step / SUBSTEPS

    def residual(self, token_ids: Int32, coordinates: mx.array, head_ids: mx.array) -> mx.array:
        """Coordinates [n, r] less what is predicted, float32.

        Args:
            token_ids: [n], input ids.
            coordinates: float32 [n, r].
            head_ids: int32 [n, k].
        """
        return take_off(
            coordinates,
            to_device(token_ids),
            head_ids,
            token_table=self._token,
            head_table=self._head,
            unit=self._unit,
        )

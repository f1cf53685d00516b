"""Stretches are judged in steps, each while the one before it is cached. Costs two samples' states."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from pipeline.calibration import Calibrator, Coding

if TYPE_CHECKING:
    from pmetal_distill.offline.calibrate import DriftMonitor
    from pmetal_distill.steps import Underway


class Stretches:
    """What the shards of each stretch are coded with. The next stretch is judged while this one is cached.

    Args:
        calibrator: judges.
        learned: what it knows of the whole data set.
        shards: that will be asked for, in this order.
    """

    def __init__(
        self, calibrator: Calibrator, learned: "Coding | DriftMonitor", shards: Sequence[int]
    ) -> None:
        self._calibrator, self._learned = calibrator, learned
        self._of = {shard: stretch for stretch in calibrator.stretches() for shard in stretch}
        order = [stretch for stretch, _ in groupby(self._of[shard] for shard in shards)]
        self._after = dict(pairwise(order))
        self._underway: dict[range, Underway[Coding]] = {}
        self._now: range | None = None

    def coding(self, shard: int) -> Coding:
        """Of this shard; waits if its stretch is not yet judged."""
        stretch = self._of[shard]
        if stretch != self._now:
            self._now = stretch
            self._calibrator.forget_before(stretch)
            wanted = (stretch, self._after.get(stretch))
            self._underway = {s: work for s, work in self._underway.items() if s in wanted}
        return self._judging(stretch).result()

    def go_on(self, shard: int) -> None:
        """To be called between the batches of a shard: another step of judging the next stretch."""
        coming = self._after.get(self._of[shard])
        if coming is not None:
            self._judging(coming).step()

    def _judging(self, stretch: range) -> "Underway[Coding]":
        from pmetal_distill.steps import Underway

        if stretch not in self._underway:
            self._underway[stretch] = Underway(self._calibrator.of_stretch(self._learned, stretch))
        return self._underway[stretch]

"""What stage one learns from samples: bases of sketch and hidden states, the codebook, whether text drifts.

The calibration sample is spread over the whole data set. Where it would be a good part of the data, all of it
is read and the teacher's states are kept for the main pass, so that calibration costs no second forward pass.
Where the data is longer than one stretch, each stretch is judged by a sample of its own, which stays for the
main pass too: states of at most 32k tokens, or of one batch. Of shorter data each quarter is judged, which
costs no forward pass either, and keeps the one basis. All of it is a pure function of the settings and
the data, so a resumed run and several workers come to the same.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.console import Console
from pipeline.settings import CacheSettings
from pipeline.teacher import TeacherRunner, TeacherStates
from schemas.errors import UsageError
from schemas.hidden_spec import HiddenSpec
from schemas.spec import TargetSpec

if TYPE_CHECKING:
    import mlx.core as mx

    from pmetal_distill.models import LoadedModel
    from pmetal_distill.offline.calibrate import Calibration, DriftMonitor
    from pmetal_distill.offline.capture import CoordinateMap
    from pmetal_distill.offline.device_predictor import DevicePredictor
    from pmetal_distill.offline.sample import Sample
    from pmetal_distill.offline.writer import Sidecars
    from pmetal_distill.steps import Steps
    from schemas.hidden import HiddenBasis

CODEBOOK_TOKENS = 4096
KEEP_ALL_FACTOR = 3
HELD_BACK_SHARE = 8
HELD_BACK_TOKENS = 1024
STRETCH_TOKENS = 1 << 19
JUDGED_TOKENS = 2304
JUDGED_HELD_BACK_TOKENS = 256
LEAST_HELD_BACK_TOKENS = 32
HIDDEN_TOKENS = 4096
MOST_JUDGED_BATCHES = 4
PARTS, PART_TEMPERATURES = 4, (1.0, 2.0)
MOST_KEPT_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True, eq=False)
class Coding:
    """What the shards of a stretch are coded with.

    Attributes:
        sidecars: for the writer.
        map: makes sketch coordinates; None without a sketch.
        measured: errors by name, for the commit records: of text of the stretch, or of the data set's held
            back sample and of each quarter where it is one stretch; `drift` is the largest KL at T = 2 in
            multiples of that of the sample. Empty without a sketch.
    """

    sidecars: "Sidecars"
    map: "CoordinateMap | None" = None
    measured: Mapping[str, float] = field(default_factory=dict)

    def predictor(self) -> "DevicePredictor | None":
        """The basis' predictor in the device's memory; None without one."""
        from pmetal_distill.offline.device_predictor import DevicePredictor

        basis = self.sidecars.basis
        return DevicePredictor(basis) if basis is not None and basis.predictor is not None else None


@dataclass(slots=True, eq=False)
class Calibrator:
    """Makes the sidecars of a cache.

    Args:
        settings: of the stage.
        teacher: the loaded teacher.
        runner: feeds it.
        spec: of the targets.
        console: where progress goes.
        hidden: of the hidden states that are kept too, or None.

    Attributes:
        forward_seconds: spent on forward passes whose states the main pass takes over.
        sequences_read: numbers of those that were read last.
    """

    settings: CacheSettings
    teacher: "LoadedModel"
    runner: TeacherRunner
    spec: TargetSpec
    console: Console
    hidden: HiddenSpec | None = None
    forward_seconds: float = 0.0
    sequences_read: Sequence[int] = ()
    _hidden_basis: "HiddenBasis | None" = None
    _sampled_sequences: frozenset[int] = frozenset()
    _fitted_documents: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def learn(self) -> "Coding | DriftMonitor":
        """What the whole data set shares: all there is to it, or for a sketch the judge of its stretches."""
        if self.spec.tail == "sketch":
            return self.monitor()
        with_rank = self.hidden is not None and self.hidden.rank > 0
        sample = self._sample(
            self._sampled(self.settings.calibration_tokens if with_rank else CODEBOOK_TOKENS)
        )
        return self.plain_coding(sample, self.spec)

    def monitor(self) -> "DriftMonitor":
        """The calibration of the whole data set, and the judge of its stretches."""
        from pmetal_distill.offline.calibrate import DriftMonitor, calibrate

        sample, held_back = self.samples(most=HELD_BACK_TOKENS)
        calibration = calibrate(
            sample,
            held_back,
            self.spec,
            rank=self.settings.rank,
            step=self.settings.sketch_step,
            head=self.teacher.head,
        )
        return DriftMonitor(calibration, self.teacher.head)

    def samples(self, *, most: int) -> tuple["Sample", "Sample"]:
        """Rows of the whole data set to fit on and, of other documents, at most `most` to measure on."""
        rows = self._sampled(self.settings.calibration_tokens)
        self._fitted_documents = np.unique(rows.documents[~held_apart(rows.documents)])
        self._sampled_sequences = frozenset(self.sequences_read)
        return self._split(rows, most=most)

    def plain_coding(self, sample: "Sample", spec: TargetSpec) -> Coding:
        """What shards without a sketch are coded with."""
        from pmetal_distill.offline.writer import Sidecars
        from schemas.codebook import Codebook

        codebook = Codebook.fit(sample.captured(spec, None), spec)
        return Coding(Sidecars(codebook=codebook, hidden_basis=self._hidden_basis))

    def stretches(self) -> list[range]:
        """The shards of each stretch."""
        every = slice(None, None, self.settings.sequences_per_shard)
        return cut_stretches(self.runner.dataset.first_tokens(every), tokens=STRETCH_TOKENS)

    def of_stretch(self, learned: "Coding | DriftMonitor", stretch: range) -> "Steps[Coding]":
        """What the shards of a stretch are coded with, found in steps."""
        if isinstance(learned, Coding):
            return learned
        known = learned.calibration
        numbers = self._sequences(stretch)
        if len(numbers) == self.runner.dataset.num_sequences:
            return self.coding(known, more=(yield from self._judge_parts(learned)))
        chosen = yield from self.judge(learned, numbers)
        refitted = chosen.basis is not known.basis
        judged = chosen.error is not known.error
        self._say_drift(learned, chosen, stretch, refitted=refitted)
        more = {"drift": float(f"{learned.drift(chosen.error):.3g}")} if judged else {}
        return self.coding(chosen, refitted=refitted, more=more)

    def _say_drift(
        self, monitor: "DriftMonitor", chosen: "Calibration", stretch: range, *, refitted: bool
    ) -> None:
        start = f"shards {stretch.start} to {stretch.stop - 1}: the text is unlike the sample"
        times = f"{monitor.drift(chosen.error):.2f} times the sample's ({monitor.factor:g} is the bound)"
        unsettled = monitor.drifted(chosen.error)
        if refitted:
            tokens = self.runner.dataset.tokens_in(self._sequences(stretch))
            share = len(chosen.basis.to_bytes()) / tokens
            own = f"a basis of their own ({share:,.0f} bytes for each of their tokens)"
            still = f"; with {own} the KL at T = 2 is still {times}"
            self.console.note(start + (still if unsettled else f", so they have {own}"))
        elif unsettled:
            self.console.note(f"{start}, and a basis of their own gains nothing: the KL at T = 2 is {times}")

    def _judge_parts(self, monitor: "DriftMonitor") -> "Steps[dict[str, float]]":
        """Errors of each quarter of the data, for the commit records; in steps."""
        count = self.runner.dataset.num_sequences
        edges = [count * part // PARTS for part in range(PARTS + 1)]
        found: dict[str, float] = {}
        drifts: dict[int, float] = {}
        for part, (start, stop) in enumerate(pairwise(edges), 1):
            held_back = yield from self._held_back_of(range(start, stop))
            if held_back is None or len(held_back) < LEAST_HELD_BACK_TOKENS:
                continue
            error = yield from monitor.errors(held_back)
            # Few digits: every record of a cache that may be small holds them.
            found |= {f"part{part}.kl@{t:g}": float(f"{error[t].kl:.3g}") for t in PART_TEMPERATURES}
            drifts[part] = monitor.drift(error)
        if not drifts:
            return found
        worst = max(drifts, key=lambda part: drifts[part])
        if drifts[worst] > monitor.factor:
            self.console.note(
                f"quarter {worst} of the text is unlike the sample of all of it: its KL at T = 2 is "
                f"{drifts[worst]:.2f} times the sample's ({monitor.factor:g} is the bound); make "
                "caches of each kind of text, or raise --calibration-tokens or --sketch-rank"
            )
        return found | {"drift": float(f"{drifts[worst]:.3g}")}

    def _held_back_of(self, sequences: range) -> "Steps[Sample | None]":
        """Rows of a part to measure on, of documents that nothing was fitted on; None without any.

        Where there are too few and not all text was sampled, of sequences that were not.
        """
        kept_all = len(self._sampled_sequences) == self.runner.dataset.num_sequences
        members = [n for n in sequences if kept_all or n not in self._sampled_sequences]
        if not members:
            return None
        most = MOST_JUDGED_BATCHES if kept_all else 1
        rows = yield from self._rows_of(members, most_batches=most, kept=PARTS)
        apart = ~np.isin(rows.documents, self._fitted_documents)
        if np.count_nonzero(apart) < LEAST_HELD_BACK_TOKENS:
            if kept_all:
                return None
            apart[:] = True
        return self._sample(rows[apart]).thinned(JUDGED_HELD_BACK_TOKENS)

    def forget_before(self, stretch: range) -> None:
        """Gives up kept states of what lies before a stretch."""
        self.runner.forget_before(self._sequences(stretch).start)

    def judge(self, monitor: "DriftMonitor", sequences: range) -> "Steps[Calibration]":
        """The calibration that a stretch uses, with the errors measured on its own text; in steps."""
        sample, held_back = yield from self.samples_of(sequences)
        if min(len(held_back), len(sample)) < LEAST_HELD_BACK_TOKENS:
            return monitor.calibration
        return (yield from monitor.choosing(sample, held_back))

    def samples_of(self, sequences: range) -> "Steps[tuple[Sample, Sample]]":
        """Rows of a stretch to fit on and, of other documents, to measure on; in steps."""
        # Those of the stretch before may still be waiting for their turn.
        rows = yield from self._rows_of(sequences, most_batches=MOST_JUDGED_BATCHES, kept=2)
        return self._split(rows, most=JUDGED_HELD_BACK_TOKENS)

    def _rows_of(self, sequences: Sequence[int], *, most_batches: int, kept: int) -> "Steps[SampledRows]":
        """Rows of a few batches, evenly spread over sequences, of which there are some; in steps.

        Args:
            sequences: ascending.
            most_batches: how many batches.
            kept: calls of which the states may wait for the main pass at once.
        """
        starts = sorted({self.runner.batch_of(number).start for number in sequences})
        size = self.settings.batch_size * self.settings.max_seq_len
        count = max(1, min(len(starts), most_batches, MOST_KEPT_TOKENS // size))
        chosen = {starts[i] for i in np.linspace(0, len(starts) - 1, count).astype(int)}
        members = [n for n in sequences if self.runner.batch_of(n).start in chosen]
        total = self._num_targets(members)
        self.sequences_read = members
        self.runner.keep_tokens = max(self.runner.keep_tokens, kept * count * size)
        found = self.runner.run(members, keep=True)
        return (yield from SampledRows.gathering(found, total, most=JUDGED_TOKENS))

    def coding(
        self,
        calibration: "Calibration",
        *,
        refitted: bool = False,
        more: Mapping[str, float] | None = None,
    ) -> Coding:
        """What shards with this calibration are coded with."""
        from pmetal_distill.offline.writer import Sidecars

        sidecars = Sidecars(calibration.basis, calibration.codebook, self._hidden_basis)
        measured = {**calibration.measured(), "refitted": float(refitted), **(more or {})}
        return Coding(sidecars, calibration.map, measured)

    def _sequences(self, stretch: range) -> range:
        per_shard, count = self.settings.sequences_per_shard, self.runner.dataset.num_sequences
        return range(stretch.start * per_shard, min(stretch.stop * per_shard, count))

    def _sampled(self, num_tokens: int) -> "SampledRows":
        """Rows of the whole data set, evenly spread; the basis of hidden states is fitted on the way."""
        data = self.runner.dataset
        if KEEP_ALL_FACTOR * num_tokens >= data.num_targets:
            self.runner.keep_tokens = data.num_targets
            self.sequences_read = range(data.num_sequences)
            found, total = self._all_kept(), data.num_targets
        else:
            chosen = data.sample_sequences(num_tokens, seed=self.settings.seed).tolist()
            self.sequences_read = chosen
            found, total = self.runner.sample(chosen), self._num_targets(chosen)
        with self.console.progress("calibrating", total=total, unit="tokens") as progress:

            def watched() -> Iterable[TeacherStates]:
                for states in found:
                    yield states
                    progress.advance(len(states.final))

            with_rank = self.hidden if self.hidden and self.hidden.rank else None
            layers = with_rank.layers if with_rank else ()
            rows = SampledRows.of(watched(), total, most=num_tokens, layers=layers)
        if with_rank:
            self._hidden_basis = fit_hidden_basis(rows.layers, with_rank)
        return rows

    def _all_kept(self) -> Iterable[TeacherStates]:
        import mlx.core as mx

        started = time.perf_counter()
        for states in self.runner.run(range(self.runner.dataset.num_sequences), keep=True):
            mx.eval(states.final, dict(states.layers))
            self.forward_seconds += time.perf_counter() - started
            yield states
            started = time.perf_counter()

    def _num_targets(self, sequences: Sequence[int]) -> int:
        return sum(map(self.runner.dataset.targets_in, sequences))

    def _split(self, rows: "SampledRows", *, most: int) -> tuple["Sample", "Sample"]:
        """Rows to fit on and, of other documents, at most `most` rows to measure on."""
        apart = held_apart(rows.documents)
        return self._sample(rows[~apart]), self._sample(rows[apart]).thinned(most)

    def _sample(self, rows: "SampledRows") -> "Sample":
        from pmetal_distill.offline.capture import rows_at_once
        from pmetal_distill.offline.sample import Sample

        chunk = rows_at_once(self.settings.head_chunk, self.spec.vocab_size)

        def logits_of(states: "mx.array") -> "mx.array":
            return self.teacher.logits(states.astype(rows.dtype)) if self.teacher.splits else states

        return Sample(rows.states, logits_of, chunk, token_ids=rows.token_ids)


def held_apart(groups: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which rows to measure on: those of every eighth group of rows that belong together.

    Args:
        groups: [n], the document or sequence of each row.
    """
    apart = np.isin(groups, np.unique(groups)[HELD_BACK_SHARE - 1 :: HELD_BACK_SHARE])
    if apart.any():
        return apart
    # Too few to set one apart: the end of the sample is the next best.
    return np.arange(len(groups)) >= len(groups) - len(groups) // HELD_BACK_SHARE


def cut_stretches(firsts: NDArray[np.int64], *, tokens: int) -> list[range]:
    """Ranges of shards that share a choice of basis: those whose first tokens lie in one window of `tokens`.

    Args:
        firsts: number of the first token of each shard.
        tokens: size of a stretch, about: it has at least one shard. A basis of a stretch's own weighs 2 r + 4
            bytes for each entry of the vocabulary (26 MB at V=49k, r=256: 50 bytes a token of a stretch).
    """
    windows = firsts // tokens
    edges = [0, *(np.flatnonzero(np.diff(windows)) + 1).tolist(), len(firsts)]
    return [range(start, stop) for start, stop in pairwise(edges)]


@dataclass(frozen=True, slots=True, eq=False)
class SampledRows:
    """Trained positions of sampled sequences.

    Attributes:
        states: float32 [n, d], final hidden states.
        token_ids: int32 [n], the input token.
        documents: int32 [n], its document.
        dtype: of the teacher's own states.
        layers: block -> float32 [m, d], of at most `HIDDEN_TOKENS` of the positions.
    """

    states: NDArray[np.float32]
    token_ids: NDArray[np.int32]
    documents: NDArray[np.int32]
    dtype: "mx.Dtype"
    layers: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    @staticmethod
    def of(
        found: Iterable[TeacherStates], total: int, *, most: int, layers: Sequence[int] = ()
    ) -> "SampledRows":
        """At most `most` of the `total` rows that are found, evenly spread; only they leave the device."""
        from pmetal_distill.steps import finish

        return finish(SampledRows.gathering(found, total, most=most, layers=layers))

    @staticmethod
    def gathering(
        found: Iterable[TeacherStates], total: int, *, most: int, layers: Sequence[int] = ()
    ) -> "Steps[SampledRows]":
        """`of` in steps."""
        import mlx.core as mx

        chosen = np.linspace(0, total - 1, min(most, total)).astype(np.int64)
        every = -(-len(chosen) // HIDDEN_TOKENS)
        states, token_ids, documents, start, dtype = [], [], [], 0, mx.float32
        blocks: dict[int, list[NDArray[np.float32]]] = {index: [] for index in layers}
        for part in found:
            stop, mask, dtype = start + len(part.final), part.batch.loss_mask, part.final.dtype
            first, last = np.searchsorted(chosen, start), np.searchsorted(chosen, stop)
            rows = chosen[first:last] - start
            copies = [_queued(part.final, rows)]
            token_ids.append(part.batch.token_ids[mask][rows])
            documents.append(part.batch.documents[mask][rows])
            few = np.flatnonzero(mask)[rows[-first % every :: every]]
            for index in blocks:
                block = part.layers[index]
                copies.append(_queued(block.reshape(-1, block.shape[-1]), few))
            yield
            states.append(copies[0]())
            for found_block, copy in zip(blocks.values(), copies[1:], strict=True):
                found_block.append(copy())
            start = stop
        columns = (np.concatenate(states), np.concatenate(token_ids), np.concatenate(documents))
        return SampledRows(*columns, dtype, {index: np.concatenate(b) for index, b in blocks.items()})

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: Any) -> "SampledRows":
        return SampledRows(self.states[rows], self.token_ids[rows], self.documents[rows], self.dtype)


def fit_hidden_basis(states: Mapping[int, NDArray[np.float32]], spec: HiddenSpec) -> "HiddenBasis":
    """The PCA of sampled hidden states.

    Raises:
        UsageError: fewer states than its rank.
    """
    from schemas.hidden import HiddenBasis

    count = min(map(len, states.values()))
    if count < spec.rank:
        raise UsageError(
            f"hidden_rank: must be at most the {count} positions that it is fitted on, found {spec.rank}; "
            "give more text, more calibration tokens or a smaller rank"
        )
    return HiddenBasis.fit(dict(states), spec)


def _queued(states: "mx.array", rows: NDArray[np.int64]) -> Callable[[], NDArray[np.float32]]:
    """Some rows as float32, asked for; the function returned waits for them."""
    import mlx.core as mx

    from pmetal_distill.host_inputs import to_device
    from pmetal_distill.host_results import HostCopy

    if not len(rows):
        return lambda: np.zeros((0, states.shape[-1]), np.float32)
    return HostCopy(states[to_device(rows.astype(np.int32))].astype(mx.float32)).take

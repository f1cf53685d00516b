"""Reading a cache: its description, single sequences, and batches in a reproducible order.

Opening costs the commit records and sidecars; each shard is hashed (1 GB/s) before its first use.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmetal_distill.offline.batch import StoredSequence
from pmetal_distill.offline.batches import BatchIterator, Sequences, read_batches
from pmetal_distill.offline.index import SequenceIndex
from pmetal_distill.offline.shard_reader import CheckedFiles, Shard, ShardReader
from pmetal_distill.offline.store import Store
from schemas.arrays import TargetArrays
from schemas.basis import SketchBasis
from schemas.codec import Codec
from schemas.errors import IncompatibleError, UsageError
from schemas.hidden import HiddenCodec
from schemas.manifest import CommitRecord, Dataset, FileRef
from schemas.spec import TargetSpec


class LogitCache:
    """A cache folder, opened for reading.

    Args:
        path: the folder, or its URL in object storage (see `offline.remote`), read through a local mirror.
        k: truncate heads to this many entries; the others join the tail.
        rank: truncate sketches to this many coordinates; 0 leaves the tail as a bucket.
        with_tail: false leaves the renormalised head only, as if the cache had tail "none".
        hidden_layers: hidden states to read along; none costs nothing.
        verify_hashes: "lazy" hashes a shard before its first use, "eager" all files now, "never" none (page
            CRCs are always checked).
        allow_partial: accept a cache whose shards are not all committed.

    Raises:
        UsageError: not a cache.
        CorruptionError: a record or sidecar is damaged.
        VersionError: written by a newer version.
        IncompatibleError: incomplete, or `k`, `rank` or layers that are not stored.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        k: int | None = None,
        rank: int | None = None,
        with_tail: bool = True,
        hidden_layers: Sequence[int] = (),
        verify_hashes: Literal["lazy", "eager", "never"] = "lazy",
        allow_partial: bool = False,
    ) -> None:
        if verify_hashes not in ("lazy", "eager", "never"):
            raise UsageError(
                f"LogitCache: verify_hashes must be lazy, eager or never, found {verify_hashes!r}"
            )
        self.store = Store.open(path)
        self.hidden_layers = tuple(hidden_layers)
        self._verify = verify_hashes != "never"
        self._checked = CheckedFiles()
        self.records = self._read_records(allow_partial)
        self._files: dict[str, Any] = {}
        self._full_bases = self._read_bases()
        stored = self.dataset.target
        self._k = stored.with_k(stored.k if k is None else k).k
        self._with_tail = with_tail
        self._rank = self._choose_rank(rank if with_tail else 0)
        self.shards = [self._shard(record) for record in self.records]
        self._reader = self._new_reader()
        self._index = SequenceIndex.of(self.shards)
        if verify_hashes == "eager":
            self._check_all()

    @property
    def dataset(self) -> Dataset:
        """The cache's description."""
        return self.store.dataset

    @cached_property
    def spec(self) -> TargetSpec:
        """The layout of the targets as they are handed out, after truncation."""
        spec = self.dataset.target.with_k(self._k)
        if not self._with_tail:
            return replace(spec, tail="none")
        return replace(spec, tail="bucket") if spec.tail == "sketch" and self._rank == 0 else spec

    @property
    def rank(self) -> int:
        """Sketch coordinates handed out."""
        return self._rank

    @cached_property
    def bases(self) -> tuple[SketchBasis, ...]:
        """The sketch bases, truncated to `rank`; `basis_index` counts in here."""
        if self._rank == 0:
            return ()
        return tuple(
            b if b.rank == self._rank else b.truncated(self._rank) for b in self._full_bases.values()
        )

    @property
    def basis_names(self) -> tuple[str, ...]:
        """File names of the bases."""
        return tuple(self._full_bases) if self._rank else ()

    @property
    def num_sequences(self) -> int:
        """Sequences that can be read."""
        return len(self._index.numbers)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Numbers of the sequences that can be read, ascending; all of 0..N-1 in a complete cache."""
        return self._index.numbers

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each of them."""
        return self._index.lengths

    @property
    def num_tokens(self) -> int:
        """Tokens in them."""
        return sum(record.num_tokens for record in self.records)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens inside the loss mask."""
        return sum(record.num_trained_tokens for record in self.records)

    @property
    def root(self) -> str:
        """A hash that names exactly this content."""
        return self.store.manifest_root(self.records)

    @property
    def text(self) -> str:
        """A hash that names the text: tokens, packing and loss masks."""
        return self.dataset.fingerprint["data"]

    @property
    def tokenizer_path(self) -> Path:
        """The teacher's tokenizer files, after checking their hashes.

        Raises:
            CorruptionError: one of them is missing or changed, or there are others.
        """
        return self.store.tokenizer()

    def bytes_per_token(self) -> dict[str, float]:
        """Bytes on disk by column, over all tokens, and `footers`, `records`, `hidden`, `sidecars`.

        Raises:
            CorruptionError: a shard is damaged.
        """
        sizes: Counter[str] = Counter()
        for record in self.records:
            footer = record.targets.num_bytes
            meta = self._reader.metadata(record.targets)
            for i in range(meta.num_row_groups):
                for j in range(meta.num_columns):
                    column = meta.row_group(i).column(j)
                    sizes[column.path_in_schema] += column.total_compressed_size
                    footer -= column.total_compressed_size
            sizes["footers"] += footer
            sizes["records"] += len(record.to_bytes())
            sizes["hidden"] += record.hidden.num_bytes if record.hidden else 0
        sidecars = {
            path: ref for r in self.records for path, ref in r.files().items() if path.startswith("bases/")
        }
        sizes["sidecars"] = sum(ref.num_bytes for ref in sidecars.values())
        return {name: size / self.num_tokens for name, size in sizes.items()}

    def sequence(self, number: int) -> StoredSequence:
        """One sequence by its number in the data set.

        Raises:
            IncompatibleError: not in the cache.
            CorruptionError: damaged.
        """
        return self._load(self._index.group_of(number), self._reader)[number]

    def batches(
        self,
        *,
        batch_size: int,
        seed: int,
        state: dict[str, Any] | None = None,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        shuffle: bool = True,
        window: int = 16,
        subset: npt.ArrayLike | None = None,
        prefetch: int = 2,
        pad_multiple: int = 32,
        length: int | None = None,
    ) -> BatchIterator:
        """Batches in an order that depends on (seed, epoch, text) only.

        Args:
            batch_size: sequences in a global batch, over all ranks.
            seed: of the order.
            state: go on from this position, saved by any rank of any world size.
            rank, world_size: this process takes slice `rank` of each global batch.
            epochs: passes over the data in total; None never ends. The last batch of the last epoch may be
                smaller; other batches reach into the next epoch.
            shuffle: false keeps the order of the data.
            window: row groups shuffled together; memory grows with it.
            subset: sequence numbers to read instead of all.
            prefetch: batches made ahead by a thread, with row groups loaded ahead by others; 0 makes them on
                demand.
            pad_multiple, length: L is the longest sequence of the global batch rounded up, or fixed.

        Raises:
            IncompatibleError: options out of bounds, or a state of another order.
        """
        sequences = Sequences(
            self.root,
            self.text,
            self._index.members(),
            self._index.group_of,
            self._index.longest,
            load=self._loader(),
            empty=self._empty(),
        )
        return read_batches(
            sequences,
            batch_size=batch_size,
            seed=seed,
            state=state,
            rank=rank,
            world_size=world_size,
            epochs=epochs,
            shuffle=shuffle,
            window=window,
            subset=subset,
            prefetch=prefetch,
            pad_multiple=pad_multiple,
            length=length,
        )

    def raw_shards(self) -> Iterator[tuple[Codec, list[bytes]]]:
        """Target files as bytes, by codec: for measuring."""
        for name in {s.record.basis for s in self.shards}:
            members = [s for s in self.shards if s.record.basis == name]
            yield members[0].codec, [self._raw(s.record.targets) for s in members]

    def close(self) -> None:
        """Close the files kept open."""
        self._reader.close()

    def _read_records(self, allow_partial: bool) -> list[CommitRecord]:
        done = self.store.committed()
        if len(done) != self.dataset.num_shards and not allow_partial:
            found = f"{len(done)} of {self.dataset.num_shards}"
            advice = "finish it with 'pmetal-pipeline cache --resume'"
            raise IncompatibleError(
                f"{self.store.root.name}: all shards must be committed, found {found}; {advice}"
            )
        return [self.store.record(shard) for shard in done]

    def _read_bases(self) -> dict[str, SketchBasis]:
        refs = {r.basis.name: r.basis for r in self.records if r.basis}
        return {name: self.store.basis(ref) for name, ref in refs.items()}

    def _choose_rank(self, rank: int | None) -> int:
        stored = sorted({basis.rank for basis in self._full_bases.values()}) or [0]
        if rank is None and len(stored) > 1:
            must = f"rank must be given, at most {stored[0]}, where bases differ"
            raise IncompatibleError(f"LogitCache: {must}, found ranks {stored}")
        chosen = stored[0] if rank is None else rank
        if not 0 <= chosen <= stored[0]:
            raise IncompatibleError(
                f"LogitCache: rank must be from 0 to the stored {stored[0]}, found {chosen}"
            )
        return chosen

    def _shard(self, record: CommitRecord) -> Shard:
        basis = self._full_bases[record.basis.name] if record.basis else None
        codebook = self._sidecar(record.codebook, self.store.codebook)
        hidden = None
        if self.hidden_layers:
            if self.dataset.hidden is None:
                raise IncompatibleError("LogitCache: hidden layers must be stored, found none in this cache")
            hidden = HiddenCodec(
                self.dataset.hidden, self._sidecar(record.hidden_basis, self.store.hidden_basis)
            )
            hidden.columns(self.hidden_layers)
        first = self.dataset.shard_range(record.shard).start
        return Shard(record, first, Codec(self.dataset.target, basis, codebook), hidden)

    def _sidecar(self, ref: FileRef | None, read: Any) -> Any:
        if ref is None:
            return None
        if ref.name not in self._files:
            self._files[ref.name] = read(ref)
        return self._files[ref.name]

    def _new_reader(self) -> ShardReader:
        return ShardReader(self.store, checked=self._checked, verify=self._verify)

    def _empty(self) -> TargetArrays:
        return TargetArrays.empty(0, k=self._k, num_nodes=self.spec.num_nodes, rank=self._rank)

    def _loader(self) -> Callable[[int], dict[int, StoredSequence]]:
        """Loads row groups in any thread, in each with a reader of its own."""
        own = threading.local()

        def load(index: int) -> dict[int, StoredSequence]:
            if not hasattr(own, "reader"):
                own.reader = self._new_reader()
            return self._load(index, own.reader)

        return load

    def _load(self, index: int, reader: ShardReader) -> dict[int, StoredSequence]:
        """All sequences of a row group."""
        shard, group = self._index.groups[index]
        rows, targets = reader.targets(shard, group, k=self._k, rank=self._rank)
        if not self._with_tail:
            targets = replace(targets, tail_curve=targets.tail_curve[..., :0])
        states = reader.hidden(shard, group, self.hidden_layers) if self.hidden_layers else {}
        basis = shard.record.basis.name if shard.record.basis and self._rank else ""
        basis_index = self.basis_names.index(basis) if basis else -1
        result, start = {}, 0
        for number, length in zip(shard.sequence_numbers(group), shard.record.groups[group], strict=True):
            part = slice(start, start + length)
            result[number] = StoredSequence(
                number,
                rows.token_ids[part],
                rows.documents[part],
                rows.loss_mask[part],
                targets[part],
                basis_index,
                {layer: a[part] for layer, a in states.items()},
            )
            start += length
        return result

    def _raw(self, ref: FileRef) -> bytes:
        self.store.fetch("shards", ref)
        return (self.store.root / "shards" / ref.name).read_bytes()

    def _check_all(self) -> None:
        sidecars: dict[str, FileRef] = {}
        for record in self.records:
            for ref in (record.targets, record.hidden):
                if ref is not None:
                    self._reader.metadata(ref)
            sidecars |= {path: ref for path, ref in record.files().items() if path.startswith("bases/")}
        for ref in sidecars.values():
            self.store.sidecar(ref)

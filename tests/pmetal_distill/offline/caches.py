"""Small caches of random targets for the tests of this folder."""

from itertools import islice

import numpy as np

from pmetal_distill.offline.reader import LogitCache
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence
from schemas.arrays import TargetArrays
from schemas.basis import CoordinateGroup, SketchBasis
from schemas.codebook import Codebook
from schemas.hidden import HiddenBasis
from schemas.hidden_spec import HiddenSpec
from schemas.manifest import Dataset
from schemas.spec import TargetSpec

FINGERPRINT = {
    "teacher": "sha256:aaaa",
    "tokenizer": "sha256:bbbb",
    "chat_template": "none",
    "data": "sha256:cccc",
    "packing": "windows of 24",
    "codec": "test",
}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}'}
GROUPS = (CoordinateGroup(0, 2, 65536), CoordinateGroup(2, 4, 255), CoordinateGroup(4, 13, 5))
SPEC = TargetSpec(vocab_size=300, k=6)
MAX_LENGTH = 24


def lengths_of(num_sequences):
    return np.random.default_rng(99).integers(3, MAX_LENGTH + 1, num_sequences)


def make_dataset(*, num_sequences=23, per_shard=5, spec=SPEC, hidden=None, rows_per_group=40, **changes):
    tokens = int(lengths_of(num_sequences).sum())
    return Dataset(
        FINGERPRINT | changes, spec, num_sequences, tokens, per_shard, MAX_LENGTH, rows_per_group, hidden
    )


def make_sequence(dataset, number):
    """The one true content of a sequence: a pure function of its number."""
    rng = np.random.default_rng(1000 + number)
    spec, n = dataset.target, int(lengths_of(dataset.num_sequences)[number])
    logits = rng.normal(0, 3, (n, spec.vocab_size))
    order = np.argsort(-logits, axis=1)
    z = np.take_along_axis(logits, order, axis=1)
    logprobs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    tail = z[:, spec.k :] - z[:, spec.k - 1 : spec.k]
    curve = [np.logaddexp.reduce(b * tail, axis=1) for b in spec.curve_nodes]
    rank = GROUPS[-1].stop if spec.tail == "sketch" else 0
    targets = TargetArrays(
        order[:, : spec.k].astype(np.int32),
        logprobs[:, : spec.k].astype(np.float32),
        np.stack(curve, 1).astype(np.float32) if curve else np.zeros((n, 0), np.float32),
        rng.uniform(-1, 1, (n, rank)).astype(np.float32),
    )
    documents = np.sort(rng.integers(0, 3, n)).astype(np.int32)
    mask = np.append(documents[1:] == documents[:-1], False)
    hidden = dataset.hidden
    states = {
        i: rng.normal(0, 5, (n, hidden.hidden_size)).astype(np.float32)
        for i in (hidden.layers if hidden else ())
    }
    token_ids = rng.integers(0, spec.vocab_size, n).astype(np.int32)
    return CapturedSequence(token_ids, documents, mask, targets, states)


def make_basis(dataset, *, seed=0):
    rng = np.random.default_rng(seed)
    size = (dataset.target.vocab_size, GROUPS[-1].stop)
    return SketchBasis(rng.normal(size=size[0]), rng.normal(size=size), 0.5, GROUPS)


def make_codebook(dataset):
    return Codebook.fit(make_sequence(dataset, 0).targets, dataset.target)


def sidecars(dataset, *, seed=0):
    hidden = dataset.hidden
    rng = np.random.default_rng(seed)
    with_rank = hidden is not None and hidden.rank > 0
    states = {i: rng.normal(size=(200, hidden.hidden_size)) for i in hidden.layers} if with_rank else None
    return {
        "basis": make_basis(dataset, seed=seed) if dataset.target.tail == "sketch" else None,
        "codebook": make_codebook(dataset),
        "hidden_basis": HiddenBasis.fit(states, hidden) if with_rank else None,
    }


def open_writer(folder, dataset=None, **changes):
    return CacheWriter.create_or_resume(folder, dataset or make_dataset(**changes), TOKENIZER)


def write_shard(writer, index, *, seed=0):
    dataset = writer.dataset
    sequences = (make_sequence(dataset, n) for n in dataset.shard_range(index))
    return writer.write_shard(index, sequences, **sidecars(dataset, seed=seed))


def write_cache(folder, dataset=None, *, shards=None):
    """A cache on disk, complete unless `shards` says which."""
    dataset = dataset or make_dataset()
    with CacheWriter.create_or_resume(folder, dataset, TOKENIZER) as writer:
        for index in range(dataset.num_shards) if shards is None else shards:
            write_shard(writer, index)
    return folder


def hidden_spec(**changes):
    return HiddenSpec(**({"layers": (1, 3), "hidden_size": 20, "group_size": 8} | changes))


def damage_shard(folder, number):
    """Flips a bit of a shard's targets."""
    path = folder / "shards" / LogitCache(folder).records[number].targets.name
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def numbers_of(iterator, count=10**9):
    return [b.numbers.tolist() for b in islice(iterator, count)]

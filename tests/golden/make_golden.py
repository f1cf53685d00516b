"""Write the golden caches of this format version, once. They are read forever, so it never overwrites one.

    python tests/golden/make_golden.py

Each folder holds a small cache and `expected.npz`: what every later version must return for it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from pmetal_distill.offline.reader import LogitCache  # noqa: E402
from pmetal_distill.offline.writer import CacheWriter, CapturedSequence  # noqa: E402
from schemas.arrays import TargetArrays  # noqa: E402
from schemas.basis import CoordinateGroup, SketchBasis  # noqa: E402
from schemas.codebook import Codebook  # noqa: E402
from schemas.hidden import HiddenBasis  # noqa: E402
from schemas.hidden_spec import HiddenSpec  # noqa: E402
from schemas.manifest import Dataset  # noqa: E402
from schemas.predictor import SketchPredictor  # noqa: E402
from schemas.spec import TargetSpec  # noqa: E402
from schemas.tail import tail_logits  # noqa: E402

GROUPS = (
    CoordinateGroup(0, 2, 65536),
    CoordinateGroup(2, 5, 255),
    CoordinateGroup(5, 8, 15),
    CoordinateGroup(8, 12, 5),
    CoordinateGroup(12, 19, 3),
)
CASES = {
    "v1-sketch": (TargetSpec(300, 6), HiddenSpec((1, 4), 20, group_size=8, rank=6), True),
    "v1-predicted": (TargetSpec(60, 4), None, True),
    "v1-bucket": (TargetSpec(70000, 3, "bucket", (0.25, 1.0, 2.0), 0.01, 0.05), None, False),
    "v1-none": (TargetSpec(20, 20, "none"), HiddenSpec((0,), 5, "float16"), True),
}
LENGTHS = (9, 3, 12, 1, 7)


def sequence(spec: TargetSpec, hidden: HiddenSpec | None, number: int) -> CapturedSequence:
    """Random content that depends on its number only; one row has extreme logits."""
    rng = np.random.default_rng(number)
    n = LENGTHS[number]
    logits = rng.normal(0, 3, (n, spec.vocab_size))
    logits[0, 0] = 5000.0
    order = np.argsort(-logits, axis=1, kind="stable")
    z = np.take_along_axis(logits, order, axis=1)
    logprobs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    tail = z[:, spec.k :] - z[:, spec.k - 1 : spec.k]
    curve = [np.logaddexp.reduce(b * tail, axis=1) for b in spec.curve_nodes]
    reach = np.concatenate([[min(g.largest, 2000)] * (g.stop - g.start) for g in GROUPS])
    rank = len(reach) if spec.tail == "sketch" else 0
    targets = TargetArrays(
        order[:, : spec.k].astype(np.int32),
        logprobs[:, : spec.k].astype(np.float32),
        np.stack(curve, 1).astype(np.float32) if curve else np.zeros((n, 0), np.float32),
        (rng.uniform(-0.5, 0.5, (n, rank)) * reach[:rank]).astype(np.float32),
    )
    documents = np.sort(rng.integers(0, 2, n)).astype(np.int32)
    mask = rng.random(n) < 0.8
    mask[0] = True
    states = {
        i: rng.normal(0, 4, (n, hidden.hidden_size)).astype(np.float32)
        for i in (hidden.layers if hidden else ())
    }
    ids = rng.integers(0, spec.vocab_size, n).astype(np.int32)
    return CapturedSequence(ids, documents, mask, targets, states)


def write(folder: Path, spec: TargetSpec, hidden: HiddenSpec | None, with_codebook: bool) -> None:
    """One golden cache."""
    rng = np.random.default_rng(7)
    fingerprint = dict.fromkeys(
        ("teacher", "tokenizer", "chat_template", "data", "packing", "codec"), "golden"
    )
    dataset = Dataset(
        fingerprint, spec, len(LENGTHS), sum(LENGTHS), 3, 12, 12, hidden, meta={"made by": "golden"}
    )
    sequences = [sequence(spec, hidden, n) for n in range(len(LENGTHS))]
    rank = GROUPS[-1].stop
    basis = SketchBasis(
        rng.normal(size=spec.vocab_size), rng.normal(size=(spec.vocab_size, rank)), 0.5, GROUPS
    )
    if folder.name == "v1-predicted":
        predictor = SketchPredictor(*(rng.normal(size=s) for s in ((rank, rank), (rank, rank), rank)))
        basis = replace(basis, predictor=predictor, margin=0.7)
    sample = TargetArrays.concatenate([s.targets for s in sequences] * 4)
    states = {i: np.concatenate([s.hidden[i] for s in sequences]) for i in (hidden.layers if hidden else ())}
    with CacheWriter.create_or_resume(folder, dataset, {"tokenizer.json": b"{}"}) as writer:
        for shard in writer.missing_shards():
            writer.write_shard(
                shard,
                [sequences[n] for n in dataset.shard_range(shard)],
                basis=basis if spec.tail == "sketch" else None,
                codebook=Codebook.fit(sample, spec) if with_codebook else None,
                hidden_basis=HiddenBasis.fit(states, hidden) if hidden and hidden.rank else None,
            )
    (folder / "_tmp").rmdir()


def expected(folder: Path, hidden: HiddenSpec | None) -> dict[str, np.ndarray]:
    """What the reader of today returns."""
    layers = hidden.layers if hidden else ()
    cache = LogitCache(folder, hidden_layers=layers)
    rows = [cache.sequence(n) for n in range(cache.num_sequences)]
    names = ("head_ids", "head_logprobs", "tail_curve", "coordinates")
    arrays = {name: np.concatenate([getattr(r.targets, name) for r in rows]) for name in names}
    for name in ("token_ids", "documents", "loss_mask"):
        arrays[name] = np.concatenate([getattr(r, name) for r in rows])
    arrays["lengths"] = np.array([len(r) for r in rows])
    if cache.bases:
        first = TargetArrays(*(arrays[name][:6] for name in names))
        arrays["tail_logits"] = tail_logits(cache.bases[0], cache.spec.curve, first)
    return arrays | {f"hidden{i}": np.concatenate([r.hidden[i] for r in rows]) for i in layers}


def main() -> None:
    """Write the cases that do not exist yet."""
    for name, (spec, hidden, with_codebook) in CASES.items():
        folder = HERE / name
        if folder.exists():
            print(f"{name}: exists, left as it is")
            continue
        write(folder, spec, hidden, with_codebook)
        np.savez_compressed(HERE / f"{name}.npz", **expected(folder, hidden))
        print(f"{name}: written")


if __name__ == "__main__":
    main()

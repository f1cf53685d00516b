"""Random targets for the tests of this folder, made the obvious way from dense float64 logits."""

import numpy as np

from schemas.arrays import TargetArrays, TokenRows
from schemas.basis import CoordinateGroup, SketchBasis
from schemas.codebook import Codebook
from schemas.codec import Codec
from schemas.predictor import SketchPredictor

ALL_LEVELS = (
    CoordinateGroup(0, 2, 65536),
    CoordinateGroup(2, 5, 255),
    CoordinateGroup(5, 10, 15),
    CoordinateGroup(10, 17, 5),
    CoordinateGroup(17, 29, 3),
)


def random_basis(vocab_size, *, groups=ALL_LEVELS, step=0.5, seed=0):
    rng = np.random.default_rng(seed)
    rank = groups[-1].stop
    return SketchBasis(
        rng.normal(size=vocab_size), rng.normal(size=(vocab_size, rank)), step, groups, {"seed": str(seed)}
    )


def random_predictor(rank, *, scale=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return SketchPredictor(*(scale * rng.normal(size=s) for s in ((rank, rank), (rank, rank), rank)))


def random_logits(num_tokens, vocab_size, *, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_tokens, vocab_size)) * scale * rng.uniform(0.2, 2, (num_tokens, 1))
    return logits.astype(np.float32).astype(np.float64)


def head_and_curve(logits, spec):
    """Exact head ids, log-probabilities and tail curve of dense logits."""
    order = np.lexsort((np.broadcast_to(np.arange(logits.shape[1]), logits.shape), -logits), axis=1)
    ids = order[:, : spec.k]
    z = np.take_along_axis(logits, order, axis=1)
    logprobs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    tail = z[:, spec.k :] - z[:, spec.k - 1 : spec.k]
    curve = [np.logaddexp.reduce(b * tail, axis=1) for b in spec.curve_nodes]
    curve = np.stack(curve, axis=1) if curve else np.zeros((len(z), 0))
    return ids.astype(np.int32), logprobs[:, : spec.k].astype(np.float32), curve.astype(np.float32)


def random_coordinates(num_tokens, basis, *, seed=0, over=1.0):
    """Coordinates inside the range of each group (times `over`)."""
    if basis is None:
        return np.zeros((num_tokens, 0), np.float32)
    rng = np.random.default_rng(seed)
    largest = np.concatenate([[min(g.largest, 3000)] * (g.stop - g.start) for g in basis.groups])
    unit = rng.uniform(-1, 1, (num_tokens, basis.rank))
    return (unit * largest * basis.step * over).astype(np.float32)


def random_case(
    spec, *, num_tokens=64, seed=0, masked=0.2, scale=3.0, with_codebook=True, with_predictor=False
):
    """(targets, rows, codec) of random logits; some rows are masked."""
    rng = np.random.default_rng(seed)
    basis = random_basis(spec.vocab_size, seed=seed) if spec.tail == "sketch" else None
    head = head_and_curve(random_logits(num_tokens, spec.vocab_size, scale=scale, seed=seed), spec)
    token_ids = rng.integers(0, spec.vocab_size, num_tokens).astype(np.int32)
    coordinates = random_coordinates(num_tokens, basis, seed=seed)
    if with_predictor and basis is not None:
        basis = basis.with_predictor(random_predictor(basis.rank, seed=seed))
        coordinates = coordinates + basis.predict(token_ids, head[0])
    targets = TargetArrays(*head, coordinates)
    codebook = Codebook.fit(targets, spec) if with_codebook else None
    sequence = np.sort(rng.integers(0, 3, num_tokens)).astype(np.int32)
    rows = TokenRows(
        token_ids=token_ids,
        sequences=sequence,
        documents=rng.integers(0, 4, num_tokens).astype(np.int32),
        loss_mask=rng.random(num_tokens) >= masked,
    )
    return targets, rows, Codec(spec, basis, codebook)

"""Launches every kernel once in every form, for tests that look at the generated texts."""

import mlx.core as mx

from pmetal_distill.kernels import capture, hidden, pair, row
from pmetal_distill.kernels.from_host import from_host
from pmetal_distill.kernels.take_off import take_off
from pmetal_distill.kernels.to_host import address_of, to_host
from schemas.spec import DEFAULT_NODES

FORMS: tuple[tuple[dict[str, bool], pair.Weights | None], ...] = (
    ({"teacher": True}, None),
    ({"teacher": True, "gap": True}, None),
    ({"term": True}, (0.3, 0.7, 0.3)),
    ({"term": True}, None),
)


def arrays_for(dtype: mx.Dtype, vocab: int = 1000, k: int = 16) -> dict[str, mx.array]:
    """Inputs of `launch_all`, eight tokens."""
    return {
        "z": mx.zeros((8, vocab), dtype),
        "t": mx.zeros((8, vocab), mx.float32),
        "ids": mx.zeros((8, k), mx.int32),
        "labels": mx.zeros((8,), mx.int32),
        "b": mx.array(0.5),
        "column": mx.zeros((8,)),
        "head": mx.zeros((8, k)),
    }


def launch_all(a: dict[str, mx.array]) -> list[mx.array]:
    """Puts every kernel into the graph."""
    z, t, ids, labels, b, c, head = a.values()
    norms = pair.PairNorms(c, c, c, c)
    found: list[mx.array] = [*row.tail_sums(z, ids, labels, b)]
    found.append(row.tail_slope(z, ids, labels, b, weights=(c, c, c), head=head, label=c))
    for reverse in (False, True):
        sums, other = pair.pair_sums(z, t, ids, labels, b, reverse=reverse)
        found += [*sums, *other]
    for weights in ((0.3, 0.7, 0.3), None):
        found += pair.pair_divergence(z, t, ids, b, norms, weights=weights)
    for used, weights in FORMS:
        factors = pair.PairWeights(c, c, **dict.fromkeys(used, c))
        found.append(
            pair.pair_slope(z, t, ids, labels, b, norms, factors, divergence=weights, head=head, label=c)
        )
    found += [hidden.launch_sums(z, t), hidden.launch_slope(z, t, [c, c, c])]
    for nodes in (DEFAULT_NODES, (0.13, 1.0)):
        found += capture(z, k=16, nodes=nodes)
    tables = [mx.zeros((20, 8), mx.int16)] * 2
    found.append(
        take_off(mx.zeros((8, 8)), labels, ids, token_table=tables[0], head_table=tables[1], unit=0.5)
    )
    found.append(to_host(labels.view(mx.uint32), address_of(0)))
    found.append(from_host(address_of(0), 0, 256))
    return found

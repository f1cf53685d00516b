"""The benchmark of soft-capped heads says what the documentation says of it."""

from benchmarks.softcap import TEMPERATURES, measure


def test_a_cap_costs_the_sketch_and_a_basis_of_the_products_less() -> None:
    plain, of_logits, of_products = measure(cap=30.0, rank=64, step=0.5).values()
    assert len(plain) == len(TEMPERATURES)
    assert of_logits[0] > 3 * plain[0]
    assert of_products[0] < of_logits[0] / 2
    uncapped = measure(cap=1e6, rank=64, step=0.5)
    first, *others = uncapped.values()
    for other in others:  # no cap: three ways to the same sketch
        assert abs(other[0] / first[0] - 1) < 0.1

"""The emulation notices what a GPU leaves undefined."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.kernels.host.builder import EmulationError, Schedule, host_kernel
from tests.kernels.tools import SCHEDULES

NAMES = """
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
"""


def _run(body: str, schedule: Schedule = SCHEDULES[0], *, threads: int = 64, size: int = 64) -> Any:
    kernel = host_kernel("probe", ["a"], ["b"], NAMES + body, schedule=lambda: schedule)
    (b,) = kernel(
        inputs=[mx.arange(size).astype(mx.float32)],
        template=[],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
    )
    return np.array(b)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sound_reduction_runs(schedule: Schedule) -> None:
    body = """
    SHARED(float, parts, 2);
    float sum = simd_sum(a[lid]);
    if (lane == 0) parts[lid / 32] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    b[lid] = parts[0] + parts[1];
    """
    assert (_run(body, schedule) == np.arange(64).sum()).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("SHARED(float, s, 64); s[lid] = 1.0f; b[lid] = s[63 - lid];", "race"),
        ("SHARED(float, s, 1); s[0] = 1.0f; b[lid] = 0.0f;", "race"),
        ("SHARED(float, s, 1); b[lid] = s[0]; s[0] = 1.0f;", "race"),
        ("SHARED_ATOMIC(s, 1); shared_add(s[0], 1u); b[lid] = float(shared_load(s[0]));", "race"),
        ("if (lid < 32) threadgroup_barrier(mem_flags::mem_threadgroup); b[lid] = 0.0f;", "32 of 64 threads"),
        (
            "if (lid < 32) { threadgroup_barrier(mem_flags::mem_threadgroup); }"
            " else { threadgroup_barrier(mem_flags::mem_threadgroup); } b[lid] = 0.0f;",
            "different barriers",
        ),
        ("if (lane < 5) b[lid] = simd_sum(a[lid]);", "5 of 32 lanes"),
        ("if (lane < 5) b[lid] = simd_sum(a[lid]); else b[lid] = simd_max(a[lid]);", "different operations"),
        ("SHARED(float, s, 8); if (lid == 0) s[8] = 1.0f; b[lid] = 0.0f;", "outside its 8"),
        ("SHARED(float, s, 9000); s[lid] = 1.0f; b[lid] = 0.0f;", "at most 32768"),
        ("b[lid] = a[lid + 4096];", "outside its arrays"),
        ("b[lid - 4096] = 1.0f;", "outside its arrays"),
        ("Vector<float, 4> v; read_vector<0>(a + 1, v); b[lid] = v.score[0];", "unaligned"),
    ],
)
def test_misuse_is_an_error(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        _run(body)


@pytest.mark.parametrize("offset", [-1, 64])
def test_one_element_beside_an_output_is_noticed(offset: int) -> None:
    body = f"b[lid] = 0.0f; if (lid == 0) b[{offset}] = 1.0f;"
    for schedule in (Schedule(0, 0), Schedule(0, 1), Schedule(0, None)):
        with pytest.raises(EmulationError, match="outside"):
            _run(body, schedule)


def test_one_element_past_an_input_is_noticed_where_it_ends_at_the_guard_page() -> None:
    with pytest.raises(EmulationError, match="outside its arrays"):
        _run("b[lid] = a[lid + 1];", Schedule(0, None))


def test_memory_starts_as_nan() -> None:
    assert np.isnan(_run("SHARED(float, s, 64); b[lid] = s[lid];")).all()
    assert np.isnan(_run("if (lid > 40) b[lid] = 1.0f;")[:41]).all()


def test_atomics_of_many_threads_are_no_race() -> None:
    body = """
    SHARED_ATOMIC(s, 1);
    if (lid == 0) shared_store(s[0], 5u);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    shared_add(s[0], 2u);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    b[lid] = float(shared_load(s[0]));
    """
    for schedule in SCHEDULES:
        assert (_run(body, schedule) == 133.0).all()


def test_a_fault_leaves_the_emulation_usable() -> None:
    for _ in range(3):
        with pytest.raises(EmulationError):
            _run("b[lid] = a[lid + 100000];")
        assert (_run("b[lid] = a[lid];") == np.arange(64)).all()


def test_orders_differ() -> None:
    body = "SHARED_ATOMIC(s, 1); uint place = shared_add(s[0], 1u); b[lid] = float(int(place) + 1);"
    orders = {tuple(_run(body, schedule).tolist()) for schedule in SCHEDULES}
    assert len(orders) == len(SCHEDULES)


def test_types_convert_as_on_a_gpu() -> None:
    values = np.array([1.0, 1 + 2**-9, 1 + 3 * 2**-9, -0.0, 3e38, 1e-40], np.float32)
    body = "if (lid < 6) { bfloat16_t h = bfloat16_t(v[lid]); b[lid] = float(h); }"
    kernel = host_kernel("convert", ["v"], ["b"], NAMES + body)
    (b,) = kernel(
        inputs=[mx.array(values)],
        template=[],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(6,)],
        output_dtypes=[mx.float32],
    )
    wanted = mx.array(values).astype(mx.bfloat16).astype(mx.float32)
    np.testing.assert_array_equal(np.array(b)[:5], np.array(wanted)[:5])

    // Second pass over a student's and a teacher's row whose normalisers are known: the tail's part of a divergence and
    // of its derivative with respect to the student's normaliser. result: [value, slope].
    // norms: [student's top, its offset, teacher's top, its offset]: ln q = (x - top) / T + offset.
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const DEVICE S* teacher = t + size_t(row) * size_t(V);
    const float rate = par[0] * LOG2E, wp = par[1], wq = par[2], share = par[3];
    const float x_top = norms[size_t(row) * 4], x_offset = norms[size_t(row) * 4 + 1] * LOG2E;
    const float y_top = norms[size_t(row) * 4 + 2], y_offset = norms[size_t(row) * 4 + 3] * LOG2E;
    const float cap = CAPPED ? ceiling[row] : -BOTTOM;
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(teacher, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
#include "mark_head.metal"
    float value = 0.0f, slope = 0.0f;
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        int bit = (column + shift) / GRAIN;
        bool out = K > 0 && ((shared_load(marks[bit >> 5]) >> (bit & 31)) & 1u) != 0u;
        if (out && GRAIN > 1) {
            out = false;
            for (int e = 0; e < K; e++) out = out || ids[size_t(row) * size_t(K) + size_t(e)] == column;
        }
        float lp = (capped<CAPPED>(float(teacher[column]), cap) - y_top) * rate + y_offset;
        float lq = (float(in[column]) - x_top) * rate + x_offset;
        Term term = MIXTURE ? mixture_term(lp, lq, wp, wq, share) : variation_term(lp, lq);
        value += out ? 0.0f : term.value;
        slope += out ? 0.0f : term.slope;
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W], y[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                read_scores<W, HINT>(in + lead + v * W, x + u * W);
                read_scores<W, HINT>(teacher + lead + v * W, y + u * W);
            }
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v >= vectors) continue;
            uint skip = 0u;
            if (K > 0) {
                int column = lead + v * W;
#include "drop_head.metal"
                skip = drop;
            }
            float more = 0.0f, more_slope = 0.0f;
#pragma unroll
            for (int j = 0; j < W; j++) {
                float lp = (capped<CAPPED>(y[u * W + j], cap) - y_top) * rate + y_offset;
                float lq = (x[u * W + j] - x_top) * rate + x_offset;
                Term term = MIXTURE ? mixture_term(lp, lq, wp, wq, share) : variation_term(lp, lq);
                bool out = ((skip >> j) & 1u) != 0u;
                more += out ? 0.0f : term.value;
                more_slope += out ? 0.0f : term.slope;
            }
            value += more;
            slope += more_slope;
        }
    }
    SHARED(float, values, 32);
    SHARED(float, slopes, 32);
    value = simd_sum(value);
    slope = simd_sum(slope);
    if (lane == 0) {
        values[group] = value;
        slopes[group] = slope;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        value = simd_sum(lane < TG / 32 ? values[lane] : 0.0f);
        slope = simd_sum(lane < TG / 32 ? slopes[lane] : 0.0f);
        if (lane == 0) {
            result[size_t(row) * 2] = value;
            result[size_t(row) * 2 + 1] = slope;
        }
    }

    // The largest score outside the head, the log sums of exp(x - largest) and exp((x - largest) / T) there, and the
    // scores of the head and the label. One read of the row. stats: [largest, ln sum, ln sum at T, 0].
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const float inverse = par[0], rate = inverse * LOG2E, slack = slack_for(inverse);
    const int power = whole_temperature(inverse);
    const int lead = lead_in<W>(in, V);
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
#include "mark_head.metal"
    Sums sums = no_sums();
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        int bit = (column + shift) / GRAIN;
        bool out = K > 0 && ((shared_load(marks[bit >> 5]) >> (bit & 31)) & 1u) != 0u;
        if (out && GRAIN > 1) {
            out = false;
            for (int e = 0; e < K; e++) out = out || ids[size_t(row) * size_t(K) + size_t(e)] == column;
        }
        float x[1];
        x[0] = out ? LOWEST : float(in[column]);
        add_scores(sums, x, rate, slack, power);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                read_scores<W, HINT>(in + lead + v * W, x + u * W);
            } else {
#pragma unroll
                for (int j = 0; j < W; j++) x[u * W + j] = LOWEST;
            }
        }
        if (K > 0) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                int v = v0 + u * TG;
                if (v >= vectors) continue;
                int column = lead + v * W;
#include "drop_head.metal"
                if (drop != 0u) {
#pragma unroll
                    for (int j = 0; j < W; j++) x[u * W + j] = (drop >> j) & 1u ? LOWEST : x[u * W + j];
                }
            }
        }
        add_scores(sums, x, rate, slack, power);
    }
    SHARED(float, partial, 4 * 32);
    raise_top(sums, simd_max(sums.top), rate);
    sums.hard = simd_sum(sums.hard);
    sums.soft = simd_sum(sums.soft);
    sums.largest = simd_max(sums.largest);
    if (lane == 0) {
        partial[group] = sums.top;
        partial[group + 32] = sums.hard;
        partial[group + 64] = sums.soft;
        partial[group + 96] = sums.largest;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        bool mine = lane < TG / 32;
        sums.top = mine ? partial[lane] : LOWEST;
        sums.hard = mine ? partial[lane + 32] : 0.0f;
        sums.soft = mine ? partial[lane + 64] : 0.0f;
        raise_top(sums, simd_max(sums.top), rate);
        float hard = simd_sum(sums.hard), soft = simd_sum(sums.soft);
        float largest = simd_max(mine ? partial[lane + 96] : LOWEST);
        bool empty = soft == 0.0f;
        float below = sums.top - largest;
        if (lane < 4) {
            float value = 0.0f;
            if (lane == 0) value = largest;
            if (lane == 1) value = empty ? 0.0f : metal::log(hard) + below;
            if (lane == 2) value = empty ? 0.0f : metal::log(soft) + below * inverse;
            stats[size_t(row) * 4 + size_t(lane)] = value;
        }
    }
    for (int i = lid; i < K; i += TG) {
        size_t at = size_t(row) * size_t(K) + size_t(i);
        head[at] = float(in[ids[at]]);
    }
    if (lid == 0) label[row] = labels[row] < 0 ? 0.0f : float(in[labels[row]]);

    // Log-sum-exp of a row at T = 1 and at T over the columns outside the head, and the head's and the label's scores.
    // One read of the row. stats: [ln sum exp, ln sum exp (x / T), top, log2 of both sums below top, 0, 0, 0].
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const float inverse = par[0], rate = inverse * LOG2E, slack = slack_for(inverse);
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
        add_scores<1, POWER, HARD>(sums, x, rate, slack);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                load_vector<W, HINT>(in + lead + v * W, x + u * W);
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
        add_scores<U * W, POWER, HARD>(sums, x, rate, slack);
    }
    SHARED(float, tops, 32);
    SHARED(float, hards, 32);
    SHARED(float, softs, 32);
    raise_top(sums, simd_max(sums.top), rate);
    sums.hard = simd_sum(sums.hard);
    sums.soft = simd_sum(sums.soft);
    if (lane == 0) {
        tops[group] = sums.top;
        hards[group] = sums.hard;
        softs[group] = sums.soft;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        sums.top = lane < TG / 32 ? tops[lane] : LOWEST;
        sums.hard = lane < TG / 32 ? hards[lane] : 0.0f;
        sums.soft = lane < TG / 32 ? softs[lane] : 0.0f;
        raise_top(sums, simd_max(sums.top), rate);
        sums.hard = simd_sum(sums.hard);
        sums.soft = simd_sum(sums.soft);
        if (lane < 8) {
            bool empty = sums.soft == 0.0f;
            float hard = HARD && !empty ? metal::log2(sums.hard) : 0.0f;
            float soft = !empty ? metal::log2(sums.soft) : 0.0f;
            float value = 0.0f;
            if (lane == 0 && HARD) value = empty ? LOWEST : sums.top + hard * LN2;
            if (lane == 1) value = empty ? LOWEST : sums.top * inverse + soft * LN2;
            if (lane == 2) value = sums.top;
            if (lane == 3) value = hard;
            if (lane == 4) value = soft;
            stats[size_t(row) * 8 + size_t(lane)] = value;
        }
    }
    for (int i = lid; i < K; i += TG) {
        size_t at = size_t(row) * size_t(K) + size_t(i);
        head[at] = float(in[ids[at]]);
    }
    if (lid == 0) label[row] = labels[row] < 0 ? 0.0f : float(in[labels[row]]);

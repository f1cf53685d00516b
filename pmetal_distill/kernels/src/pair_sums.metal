    // tail_sums for a student's row z and a teacher's row t together, and the sums that forward and reverse KL need.
    // stats: [ln sum exp x, ln sum exp (x / T), ln sum exp (y / T), mean of y under the teacher's tail,
    //         mean of y - x under it, mean of x - y under the student's tail, 0, 0,
    //         student's top, log2 of both sums below it, teacher's top, log2 of the sum below it, 0, 0, 0].
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const DEVICE S* teacher = t + size_t(row) * size_t(V);
    const float inverse = par[0], rate = inverse * LOG2E, slack = slack_for(inverse);
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(teacher, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
#include "mark_head.metal"
    PairSums sums = no_pair_sums();
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        int bit = (column + shift) / GRAIN;
        bool out = K > 0 && ((shared_load(marks[bit >> 5]) >> (bit & 31)) & 1u) != 0u;
        if (out && GRAIN > 1) {
            out = false;
            for (int e = 0; e < K; e++) out = out || ids[size_t(row) * size_t(K) + size_t(e)] == column;
        }
        float x[1], y[1];
        x[0] = out ? LOWEST : float(in[column]);
        y[0] = out ? LOWEST : float(teacher[column]);
        add_pair<1, POWER, HARD, REVERSE>(sums, x, y, rate, slack);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W], y[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                load_vector<W, HINT>(in + lead + v * W, x + u * W);
                load_vector<W, HINT>(teacher + lead + v * W, y + u * W);
            } else {
#pragma unroll
                for (int j = 0; j < W; j++) x[u * W + j] = y[u * W + j] = LOWEST;
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
                    for (int j = 0; j < W; j++) {
                        if ((drop >> j) & 1u) x[u * W + j] = y[u * W + j] = LOWEST;
                    }
                }
            }
        }
        add_pair<U * W, POWER, HARD, REVERSE>(sums, x, y, rate, slack);
    }
    SHARED(float, partial, 8 * 32);
    raise_pair(sums, simd_max(sums.student.top), simd_max(sums.top), rate);
    sums.student.hard = simd_sum(sums.student.hard);
    sums.student.soft = simd_sum(sums.student.soft);
    sums.soft = simd_sum(sums.soft);
    sums.mean = simd_sum(sums.mean);
    sums.forward = simd_sum(sums.forward);
    sums.reverse = simd_sum(sums.reverse);
    if (lane == 0) {
        partial[group] = sums.student.top;
        partial[group + 32] = sums.student.hard;
        partial[group + 64] = sums.student.soft;
        partial[group + 96] = sums.top;
        partial[group + 128] = sums.soft;
        partial[group + 160] = sums.mean;
        partial[group + 192] = sums.forward;
        partial[group + 224] = sums.reverse;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
        bool mine = lane < TG / 32;
        sums.student.top = mine ? partial[lane] : LOWEST;
        sums.student.hard = mine ? partial[lane + 32] : 0.0f;
        sums.student.soft = mine ? partial[lane + 64] : 0.0f;
        sums.top = mine ? partial[lane + 96] : LOWEST;
        sums.soft = mine ? partial[lane + 128] : 0.0f;
        sums.mean = mine ? partial[lane + 160] : 0.0f;
        sums.forward = mine ? partial[lane + 192] : 0.0f;
        sums.reverse = mine ? partial[lane + 224] : 0.0f;
        raise_pair(sums, simd_max(sums.student.top), simd_max(sums.top), rate);
        sums.student.hard = simd_sum(sums.student.hard);
        sums.student.soft = simd_sum(sums.student.soft);
        sums.soft = simd_sum(sums.soft);
        sums.mean = simd_sum(sums.mean);
        sums.forward = simd_sum(sums.forward);
        sums.reverse = simd_sum(sums.reverse);
        bool empty = sums.student.soft == 0.0f;
        float hard = HARD && !empty ? metal::log2(sums.student.hard) : 0.0f;
        float soft = !empty ? metal::log2(sums.student.soft) : 0.0f;
        float other = !empty ? metal::log2(sums.soft) : 0.0f;
        if (lane < 16) {
            float value = 0.0f;
            if (lane == 0 && HARD) value = empty ? LOWEST : sums.student.top + hard * LN2;
            if (lane == 1) value = empty ? LOWEST : sums.student.top * inverse + soft * LN2;
            if (lane == 2) value = empty ? LOWEST : sums.top * inverse + other * LN2;
            if (lane == 3) value = empty ? 0.0f : sums.mean / sums.soft;
            if (lane == 4) value = empty ? 0.0f : sums.forward / sums.soft;
            if (lane == 5) value = empty ? 0.0f : sums.reverse / sums.student.soft;
            if (lane == 8) value = sums.student.top;
            if (lane == 9) value = hard;
            if (lane == 10) value = soft;
            if (lane == 11) value = sums.top;
            if (lane == 12) value = other;
            stats[size_t(row) * 16 + size_t(lane)] = value;
        }
    }
    for (int i = lid; i < K; i += TG) {
        size_t at = size_t(row) * size_t(K) + size_t(i);
        head[at] = float(in[ids[at]]);
    }
    if (lid == 0) label[row] = labels[row] < 0 ? 0.0f : float(in[labels[row]]);

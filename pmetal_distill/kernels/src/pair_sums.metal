    // tail_sums for a student's row z and a teacher's row t together, and the means that KL divergences need.
    // stats: [student's largest, ln sum exp(x), ln sum exp(x / T), teacher's largest, ln sum exp(y / T),
    //         mean of y, mean of y - x (both under the teacher's tail), mean of x - y (under the student's tail)],
    // x and y the scores less the largest of their row's tail.
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const DEVICE S* teacher = t + size_t(row) * size_t(V);
    const float inverse = par[0], rate = inverse * LOG2E, slack = slack_for(inverse);
    const int power = whole_temperature(inverse);
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(teacher, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
#include "mark_head.metal"
    const float cap = CAPPED ? ceiling[row] : -BOTTOM;
    const float x_shift = shift_for(float(in[0])), y_shift = shift_for(float(teacher[0]));
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
        y[0] = out ? LOWEST : capped<CAPPED>(float(teacher[column]), cap);
        add_pair<REVERSE>(sums, x, y, x_shift, y_shift, rate, slack, power);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W], y[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                read_scores<W, HINT>(in + lead + v * W, x + u * W);
                read_scores<W, HINT>(teacher + lead + v * W, y + u * W);
#pragma unroll
                for (int j = 0; j < W; j++) y[u * W + j] = capped<CAPPED>(y[u * W + j], cap);
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
        add_pair<REVERSE>(sums, x, y, x_shift, y_shift, rate, slack, power);
    }
    SHARED(float, partial, 10 * 32);
    raise_pair(sums, simd_max(sums.student.top), simd_max(sums.top), rate);
    float parts[10];
    parts[0] = sums.student.top;
    parts[1] = sums.top;
    parts[2] = simd_max(sums.student.largest);
    parts[3] = simd_max(sums.largest);
    parts[4] = simd_sum(sums.student.hard);
    parts[5] = simd_sum(sums.student.soft);
    parts[6] = simd_sum(sums.soft);
    parts[7] = simd_sum(sums.mean);
    parts[8] = simd_sum(sums.forward);
    parts[9] = simd_sum(sums.reverse);
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < 10; i++) partial[i * 32 + group] = parts[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (group == 0) {
#pragma unroll
        for (int i = 0; i < 10; i++) parts[i] = lane < TG / 32 ? partial[i * 32 + lane] : (i < 4 ? LOWEST : 0.0f);
        sums.student.top = parts[0];
        sums.top = parts[1];
        sums.student.hard = parts[4];
        sums.student.soft = parts[5];
        sums.soft = parts[6];
        sums.mean = parts[7];
        sums.forward = parts[8];
        sums.reverse = parts[9];
        raise_pair(sums, simd_max(sums.student.top), simd_max(sums.top), rate);
        float x_largest = simd_max(parts[2]), y_largest = simd_max(parts[3]);
        float hard = simd_sum(sums.student.hard), soft = simd_sum(sums.student.soft), other = simd_sum(sums.soft);
        float mean = simd_sum(sums.mean), forward = simd_sum(sums.forward), reverse = simd_sum(sums.reverse);
        bool empty = soft == 0.0f;
        float x_top = x_largest - x_shift, y_top = y_largest - y_shift;
        if (lane < 8) {
            float value = 0.0f;
            if (lane == 0) value = x_largest;
            if (lane == 1) value = metal::log(hard) + sums.student.top - x_top;
            if (lane == 2) value = metal::log(soft) + (sums.student.top - x_top) * inverse;
            if (lane == 3) value = y_largest;
            if (lane == 4) value = metal::log(other) + (sums.top - y_top) * inverse;
            if (lane == 5) value = mean / other - y_top;
            if (lane == 6) value = forward / other - (y_top - x_top);
            if (lane == 7) value = REVERSE ? reverse / soft - (x_top - y_top) : 0.0f;
            stats[size_t(row) * 8 + size_t(lane)] = empty && lane != 0 && lane != 3 ? 0.0f : value;
        }
    }
    for (int i = lid; i < K; i += TG) {
        size_t at = size_t(row) * size_t(K) + size_t(i);
        head[at] = float(in[ids[at]]);
    }
    if (lid == 0) label[row] = labels[row] < 0 ? 0.0f : float(in[labels[row]]);

    // The K largest scores of a row (descending, ties by lower id), the row's log-sum-exp and smallest score, and the
    // tail's log sums at the curve's nodes. About one and an eighth reads of the row:
    //   1. Maxima of many groups over one vector in SAMPLE. Their K-th largest is a floor that at least K scores reach;
    //      the RANK-th is one that K scores nearly always reach, and few more.
    //   2. One pass: scores at or above the floor are listed, all others enter the tail's sums (relative to the floor).
    //      Should fewer than K be listed, the K-th largest maximum is the floor of a second pass.
    //   3. Exact selection among the listed ones. Those outside the head join the tail.
    // Should the list overflow (many ties, an odd order), a radix select over (score, id) finds the exact K-th score and
    // id in at most seven passes, and step 2 is done again: then exactly K are listed.
    // Nodes are b_i = P_i / GRID, or rates[i] where GRID is 0; ONE is the index of b = 1.
    const int lid = int(thread_index_in_threadgroup);
    const int lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const int lead = lead_in<W>(in, V);
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
    SHARED(uint, keys, CAP);
    SHARED(uint, columns, CAP);
    SHARED(uint, best, 256);
    SHARED(uint, best_columns, 256);
    SHARED(uint, maxima, 2 * TG);
    SHARED(uint, state, 4);
    SHARED(float, partial, 10 * 32);
    SHARED_ATOMIC(counts, 2);
    SHARED_ATOMIC(bins, 256);
    if (lid < 2) shared_store(counts[lid], 0u);
    if (V > CAP) {
        float high0 = BOTTOM, high1 = BOTTOM;
        const int left = vectors % (32 * SAMPLE);
        const int sampled = (vectors / (32 * SAMPLE)) * 32 + (left < 32 ? left : 32);
#pragma unroll 4
        for (int s = lid; s < sampled; s += TG) {
            float x[W];
            read_scores<W, 0>(in + lead + ((s / 32) * 32 * SAMPLE + s % 32) * W, x);
            high0 = larger(high0, largest_of<W / 2>(x));
            high1 = larger(high1, largest_of<W / 2>(x + W / 2));
        }
        maxima[lid] = ordered_key(high0);
        maxima[lid + TG] = ordered_key(high1);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (group == 0) {
            const uint wanted = uint(RANK);
#include "capture_floor.metal"
        }
    } else if (lid == 0) {
        state[0] = 0u;
        state[1] = 0xffffffffu;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float node_sums[8];
    Origin origin = origin_at<GRID>(LOWEST);
    float far = BOTTOM;   // the tail's largest score
    float low = -BOTTOM;  // the row's smallest
    uint listed = 0u;
    for (int turn = 0; turn < 3; turn++) {
        // Below this floor scores are no finite reference (they are masks): all are looked at by their key.
        const uint floor_key = state[0], floor_column = state[1];
        const bool open = floor_key <= BOTTOM_KEY;
        const float gate = open ? BOTTOM : key_value(floor_key);
        const float limit = open ? bits_float(0xff800000u) : gate;
        origin = origin_at<GRID>(larger(gate, LOWEST));
        far = BOTTOM;
        low = -BOTTOM;
#pragma unroll
        for (int n = 0; n < 8; n++) node_sums[n] = 0.0f;
        for (int i = lid; i < lead + V - rest; i += TG) {
            constexpr int count = 1;
            const int first = i < lead ? i : i - lead + rest;
            float x[1];
            x[0] = float(in[first]);
            low = smaller(low, x[0]);
#include "capture_step.metal"
            add_nodes<1, NODES, GRID, P0, P1, P2, P3, P4, P5, P6, P7>(node_sums, x, origin, rates);
        }
        Extremes<T> extremes;
        start_extremes(extremes, limit);
        Vector<T, W> next[U];
        const DEVICE T* at = in + lead + lid * W;
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (lid + u * TG < vectors) read_vector<HINT>(at + u * TG * W, next[u]);
        }
        for (int v0 = lid; v0 < vectors; v0 += TG * U) {
            at += TG * U * W;
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int v = v0 + u * TG;
                if (v >= vectors) continue;
                const Vector<T, W> now = next[u];
                if (v + TG * U < vectors) read_vector<HINT>(at + u * TG * W, next[u]);
                float x[W];
                open_vector(now, x);
                if (!all_below(extremes, now, x)) {
                    constexpr int count = W;
                    const int first = lead + v * W;
#include "capture_step.metal"
                }
                add_nodes<W, NODES, GRID, P0, P1, P2, P3, P4, P5, P6, P7>(node_sums, x, origin, rates);
            }
        }
        far = larger(far, highest(extremes));
        low = smaller(low, lowest_of(extremes));
        threadgroup_barrier(mem_flags::mem_threadgroup);
        listed = shared_load(counts[0]);
        const bool few = V > CAP && RANK < K && turn == 0 && listed < uint(K);
        if ((!few && listed <= uint(CAP)) || turn == 2) break;
        if (few) {
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (group == 0) {
                const uint wanted = uint(K);
#include "capture_floor.metal"
                if (lane == 0) shared_store(counts[0], 0u);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            continue;
        }
#include "capture_radix.metal"
    }
    if (listed > uint(CAP)) listed = uint(CAP);
    // The K-th of the listed scores, and among its equals the last id that still belongs to the head.
    if (group == 0) {
        uint found = 0u, above = 0u;
        for (int b = 31; b >= KEY_BIT; b--) {
            uint attempt = found | (1u << b), n = 0u;
            for (uint i = uint(lane); i < listed; i += 128u) {
#pragma unroll
                for (uint e = i; e < i + 128u; e += 32u) {  // several loads in flight: one simdgroup waits here
                    uint key = e < listed ? keys[e] : 0u;
                    n += key >= attempt ? 1u : 0u;
                }
            }
            if (simd_sum(n) >= uint(K)) found = attempt;
        }
        if (KEY_BIT > 0 && (found & 0x80000000u) == 0u) found |= (1u << KEY_BIT) - 1u;
        for (uint i = uint(lane); i < listed; i += 32u) above += keys[i] >= found ? 1u : 0u;
        uint last = 0xffffffffu;
        if (simd_sum(above) > uint(K)) {
            last = 0u;
            for (int b = 23; b >= 0; b--) {
                if ((1 << b) >= V) continue;
                uint attempt = last | (1u << b), n = 0u;
                for (uint i = uint(lane); i < listed; i += 128u) {
#pragma unroll
                    for (uint e = i; e < i + 128u; e += 32u) {
                        uint key = e < listed ? keys[e] : 0u, column = e < listed ? columns[e] : 0u;
                        n += uint(key > found) | (uint(key == found) & uint(column < attempt));
                    }
                }
                if (simd_sum(n) < uint(K)) last = attempt;
            }
        }
        if (lane == 0) {
            state[2] = found;
            state[3] = last;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint last_key = state[2], last_column = state[3];
    const float reference = key_value(last_key);
    Origin late = origin_at<0>(reference);
    float late_sums[8];
#pragma unroll
    for (int n = 0; n < 8; n++) late_sums[n] = 0.0f;
    for (uint i = uint(lid); i < listed; i += uint(TG)) {
        if (keys[i] > last_key || (keys[i] == last_key && columns[i] <= last_column)) {
            uint place = shared_add(counts[1], 1u);
            if (place < 256u) {
                best[place] = keys[i];
                best_columns[place] = columns[i];
            }
        } else {
            float x[1];
            x[0] = key_value(keys[i]);
            far = larger(far, x[0]);
            add_nodes<1, NODES, GRID, P0, P1, P2, P3, P4, P5, P6, P7>(late_sums, x, late, rates);
        }
    }
#pragma unroll
    for (int n = 0; n < NODES; n++) {
        float b = node_of<GRID, P0, P1, P2, P3, P4, P5, P6, P7>(n, rates);
        float early = node_sums[n] == 0.0f ? 0.0f : node_sums[n] * moved<GRID>(origin, b, reference);
        float sum = simd_sum(late_sums[n] + early);
        if (lane == 0) partial[n * 32 + group] = sum;
    }
    far = simd_max(far);
    low = -simd_max(-low);
    if (lane == 0) {
        partial[8 * 32 + group] = far;
        partial[9 * 32 + group] = low;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lid; i < K; i += TG) {
        uint key = best[i], column = best_columns[i];
        int rank = 0;
        for (int e = 0; e < K; e++) rank += best[e] > key || (best[e] == key && best_columns[e] < column) ? 1 : 0;
        size_t at = size_t(row) * size_t(K) + size_t(rank);
        ids[at] = int(column);
        scores[at] = key_value(key);
    }
    if (group == 0) {
        uint top_key = 0u;
        for (int i = lane; i < K; i += 32) top_key = best[i] > top_key ? best[i] : top_key;
        const float top = key_value(simd_max(top_key));
        float total = 0.0f;
        for (int i = lane; i < K; i += 32) total += exp2_fast((key_value(best[i]) - top) * LOG2E);
        total = simd_sum(total);
        far = simd_max(lane < TG / 32 ? partial[8 * 32 + lane] : BOTTOM);
        float at_one = 0.0f;
#pragma unroll
        for (int n = 0; n < NODES; n++) {
            float sum = simd_sum(lane < TG / 32 ? partial[n * 32 + lane] : 0.0f);
            if (n == ONE) at_one = sum;
            float b = node_of<GRID, P0, P1, P2, P3, P4, P5, P6, P7>(n, rates);
            // Where the sum underflows, its largest term stands for it.
            float value = sum < 1.0e-37f ? (far - reference) * b : metal::log(sum);
            if (lane == 0) curve[size_t(row) * size_t(NODES) + size_t(n)] = value;
        }
        total += at_one * exp2_fast((reference - top) * LOG2E);
        low = -simd_max(lane < TG / 32 ? -partial[9 * 32 + lane] : BOTTOM);
        if (lane == 0) {
            lse[row] = top + metal::log(total);
            lowest[row] = low;
        }
    }

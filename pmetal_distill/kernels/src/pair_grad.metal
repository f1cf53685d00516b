    // Vector-Jacobian product of pair_sums and pair_divergence: two reads and one write of the row.
    // coefficients: [hard, soft, gap, teacher, term, student's top, its log2 offset, teacher's top, its log2 offset, 0 ...]
    //   dz = hard exp(d) + (soft + gap (x - y)) exp(d / T) + teacher exp((y - teacher's top) / T) + term slope(p, q)
    // FORM 0: no gap and no term. 1: gap. 2: term, mixture. 3: term, total variation.
    const int lid = int(thread_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const DEVICE S* teacher = t + size_t(row) * size_t(V);
    DEVICE T* out = dz + size_t(row) * size_t(V);
    const float rate = par[0] * LOG2E, wp = par[1], wq = par[2], share = par[3];
    const DEVICE float* c = coefficients + size_t(row) * 16;
    const float hard = c[0], soft = c[1], gap = c[2], weight = c[3], term = c[4];
    const float x_top = c[5], x_offset = c[6], y_top = c[7], y_offset = c[8];
    const int marked = labels[row];
    const float marked_slope = d_label[row];
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(teacher, V) != lead || lead_in<W>(out, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        float x = float(in[column]), y = float(teacher[column]);
#include "pair_slope.metal"
        out[column] = T(column == marked ? g + marked_slope : g);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float xs[U * W], ys[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors) {
                load_vector<W, HINT>(in + lead + v * W, xs + u * W);
                load_vector<W, HINT>(teacher + lead + v * W, ys + u * W);
            }
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v >= vectors) continue;
            float gs[W];
            int start = lead + v * W;
#pragma unroll
            for (int j = 0; j < W; j++) {
                float x = xs[u * W + j], y = ys[u * W + j];
#include "pair_slope.metal"
                gs[j] = start + j == marked ? g + marked_slope : g;
            }
            store_vector<W, HINT>(out + start, gs);
        }
    }
    if (K > 0) {
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = lid; i < K; i += TG) {
            size_t at = size_t(row) * size_t(K) + size_t(i);
            out[ids[at]] = T(ids[at] == marked ? d_head[at] + marked_slope : d_head[at]);
        }
    }

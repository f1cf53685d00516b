    // With x and y the scores less the tops of their rows,
    //   dz = hard exp(x) + (soft + gap (x - y)) exp(x / T) + teacher exp(y / T) + term slope(p, q),
    // the label's entry added to, the head's entries set. Two reads and one write of the row; rows whose weights are 0
    // are not read. FORM 0: no gap, no term. 1: gap. 2: term of a mixture. 3: term of the total variation.
    // coefficients: [hard, soft, gap, teacher, term, 0, 0, 0]; norms: as in pair_divergence.
    const int lid = int(thread_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    const DEVICE S* teacher = t + size_t(row) * size_t(V);
    DEVICE T* out = dz + size_t(row) * size_t(V);
    const float rate = par[0] * LOG2E, wp = par[1], wq = par[2], share = par[3];
    const DEVICE float* c = coefficients + size_t(row) * 8;
    const float hard = c[0], soft = c[1], gap = c[2], weight = c[3], term = c[4];
    const bool idle = hard == 0.0f && soft == 0.0f && gap == 0.0f && weight == 0.0f && term == 0.0f;
    const DEVICE float* norm = norms + size_t(row) * 4;
    const float x_top = norm[0], x_offset = norm[1] * LOG2E, y_top = norm[2], y_offset = norm[3] * LOG2E;
    const int power = whole_temperature(par[0]);
    const int marked = labels[row];
    const float marked_slope = d_label[row];
    const float cap = CAPPED ? ceiling[row] : -BOTTOM;
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(teacher, V) != lead || lead_in<W>(out, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        float x = idle ? 0.0f : float(in[column]), y = idle ? 0.0f : float(teacher[column]);
#include "pair_slope.metal"
        out[column] = T(column == marked ? g + marked_slope : g);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float xs[U * W], ys[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v < vectors && !idle) {
                read_scores<W, HINT>(in + lead + v * W, xs + u * W);
                read_scores<W, HINT>(teacher + lead + v * W, ys + u * W);
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
            write_scores<W, HINT>(out + start, gs);
        }
    }
    if (K > 0) {
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = lid; i < K; i += TG) {
            size_t at = size_t(row) * size_t(K) + size_t(i);
            out[ids[at]] = T(ids[at] == marked ? d_head[at] + marked_slope : d_head[at]);
        }
    }

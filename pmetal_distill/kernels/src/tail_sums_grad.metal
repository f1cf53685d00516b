    // Vector-Jacobian product of tail_sums. One read and one write of the row, then the head's entries are set.
    // coefficients: [hard, soft, top, 0 ...] with hard / T = 1 sum and soft / (T * sum at T) folded in.
    const int lid = int(thread_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    DEVICE T* out = dz + size_t(row) * size_t(V);
    const float rate = par[0] * LOG2E;
    const float hard = coefficients[size_t(row) * 8], soft = coefficients[size_t(row) * 8 + 1];
    const float top = coefficients[size_t(row) * 8 + 2];
    const int marked = labels[row];
    const float marked_slope = d_label[row];
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(out, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        float d = float(in[column]) - top;
        float u = exp2_fast(d * rate);
        float g = soft * u;
        if (HARD) g += hard * exp_hard<POWER>(d, u);
        out[column] = T(column == marked ? g + marked_slope : g);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (v0 + u * TG < vectors) load_vector<W, HINT>(in + lead + (v0 + u * TG) * W, x + u * W);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v >= vectors) continue;
            float g[W];
#pragma unroll
            for (int j = 0; j < W; j++) {
                float d = x[u * W + j] - top;
                float e = exp2_fast(d * rate);
                g[j] = soft * e;
                if (HARD) g[j] += hard * exp_hard<POWER>(d, e);
            }
            int column = lead + v * W;
            if (uint(marked - column) < uint(W)) {
#pragma unroll
                for (int j = 0; j < W; j++) g[j] = column + j == marked ? g[j] + marked_slope : g[j];
            }
            store_vector<W, HINT>(out + column, g);
        }
    }
    if (K > 0) {
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = lid; i < K; i += TG) {
            size_t at = size_t(row) * size_t(K) + size_t(i);
            out[ids[at]] = T(ids[at] == marked ? d_head[at] + marked_slope : d_head[at]);
        }
    }

    // dz = hard exp(x - top) + soft exp((x - top) / T), the label's entry added to, the head's entries set.
    // One read and one write of the row; rows whose weights are 0 are not read. coefficients: [hard, soft, top, 0].
    const int lid = int(thread_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.x);
    const DEVICE T* in = z + size_t(row) * size_t(V);
    DEVICE T* out = dz + size_t(row) * size_t(V);
    const float rate = par[0] * LOG2E;
    const int power = whole_temperature(par[0]);
    const float hard = coefficients[size_t(row) * 4], soft = coefficients[size_t(row) * 4 + 1];
    const float top = coefficients[size_t(row) * 4 + 2];
    const bool idle = hard == 0.0f && soft == 0.0f;
    const int marked = labels[row];
    const float marked_slope = d_label[row];
    int lead = lead_in<W>(in, V);
    if (lead_in<W>(out, V) != lead) lead = V;
    const int vectors = (V - lead) / W;
    const int rest = lead + vectors * W;
    for (int i = lid; i < lead + V - rest; i += TG) {
        int column = i < lead ? i : i - lead + rest;
        float x = idle ? 0.0f : float(in[column]);
        float g[1] = {0.0f};
        if (!idle) tail_slopes<0>(g, &x, top, rate, soft, hard);
        out[column] = T(column == marked ? g[0] + marked_slope : g[0]);
    }
    for (int v0 = lid; v0 < vectors; v0 += TG * U) {
        float x[U * W];
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (v0 + u * TG < vectors && !idle) read_scores<W, HINT>(in + lead + (v0 + u * TG) * W, x + u * W);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            int v = v0 + u * TG;
            if (v >= vectors) continue;
            float g[W];
#pragma unroll
            for (int j = 0; j < W; j++) g[j] = 0.0f;
            if (!idle) {
                BY_POWER(power, tail_slopes, g, x + u * W, top, rate, soft, hard);
            }
            int column = lead + v * W;
            if (uint(marked - column) < uint(W)) {
#pragma unroll
                for (int j = 0; j < W; j++) g[j] = column + j == marked ? g[j] + marked_slope : g[j];
            }
            write_scores<W, HINT>(out + column, g);
        }
    }
    if (K > 0) {
        threadgroup_barrier(mem_flags::mem_device);
        for (int i = lid; i < K; i += TG) {
            size_t at = size_t(row) * size_t(K) + size_t(i);
            out[ids[at]] = T(ids[at] == marked ? d_head[at] + marked_slope : d_head[at]);
        }
    }

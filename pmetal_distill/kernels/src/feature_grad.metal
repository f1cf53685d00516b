    // Vector-Jacobian product of feature_sums for s: ds = c0 (s - t) + c1 s + c2 t. One simdgroup a row.
    const int lane = int(thread_index_in_simdgroup);
    const int row = int(threadgroup_position_in_grid.x) * (TG / 32) + int(simdgroup_index_in_threadgroup);
    if (row >= size[0]) return;
    const DEVICE T* a = s + size_t(row) * size_t(D);
    const DEVICE S* b = t + size_t(row) * size_t(D);
    DEVICE T* out = ds + size_t(row) * size_t(D);
    const float c0 = coefficients[size_t(row) * 4], c1 = coefficients[size_t(row) * 4 + 1];
    const float c2 = coefficients[size_t(row) * 4 + 2];
    int lead = lead_in<W>(a, D);
    if (lead_in<W>(b, D) != lead || lead_in<W>(out, D) != lead) lead = D;
    const int vectors = (D - lead) / W;
    const int rest = lead + vectors * W;
    for (int i = lane; i < lead + D - rest; i += 32) {
        int column = i < lead ? i : i - lead + rest;
        float x = float(a[column]), y = float(b[column]);
        out[column] = T(c0 * (x - y) + c1 * x + c2 * y);
    }
    for (int v = lane; v < vectors; v += 32) {
        float x[W], y[W], g[W];
        read_scores<W, HINT>(a + lead + v * W, x);
        read_scores<W, HINT>(b + lead + v * W, y);
#pragma unroll
        for (int j = 0; j < W; j++) g[j] = c0 * (x[j] - y[j]) + c1 * x[j] + c2 * y[j];
        write_scores<W, HINT>(out + lead + v * W, g);
    }

    // Sums over pairs of hidden rows, one simdgroup a row. sums: [(s - t)^2, s t, s^2, t^2]. size[0]: number of rows.
    const int lane = int(thread_index_in_simdgroup);
    const int row = int(threadgroup_position_in_grid.x) * (TG / 32) + int(simdgroup_index_in_threadgroup);
    if (row >= size[0]) return;
    const DEVICE T* a = s + size_t(row) * size_t(D);
    const DEVICE S* b = t + size_t(row) * size_t(D);
    int lead = lead_in<W>(a, D);
    if (lead_in<W>(b, D) != lead) lead = D;
    const int vectors = (D - lead) / W;
    const int rest = lead + vectors * W;
    float square = 0.0f, dot = 0.0f, own = 0.0f, other = 0.0f;
    for (int i = lane; i < lead + D - rest; i += 32) {
        int column = i < lead ? i : i - lead + rest;
        float x = float(a[column]), y = float(b[column]);
        square += (x - y) * (x - y);
        dot += x * y;
        own += x * x;
        other += y * y;
    }
    for (int v = lane; v < vectors; v += 32) {
        float x[W], y[W];
        read_scores<W, HINT>(a + lead + v * W, x);
        read_scores<W, HINT>(b + lead + v * W, y);
#pragma unroll
        for (int j = 0; j < W; j++) {
            square += (x[j] - y[j]) * (x[j] - y[j]);
            dot += x[j] * y[j];
            own += x[j] * x[j];
            other += y[j] * y[j];
        }
    }
    square = simd_sum(square);
    dot = simd_sum(dot);
    own = simd_sum(own);
    other = simd_sum(other);
    if (lane == 0) {
        sums[size_t(row) * 4] = square;
        sums[size_t(row) * 4 + 1] = dot;
        sums[size_t(row) * 4 + 2] = own;
        sums[size_t(row) * 4 + 3] = other;
    }

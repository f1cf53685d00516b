    // One bit a column (or GRAIN columns) in threadgroup memory says "in the head". Bits are counted from where vectors
    // start, so that a vector's bits lie in one word. BITS is at least (V + 2 W) / GRAIN, a multiple of 32.
    const int shift = (W - lead % W) % W;
    SHARED_ATOMIC(marks, BITS / 32);
    if (K > 0) {
        for (int i = lid; i < BITS / 32; i += TG) shared_store(marks[i], 0u);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = lid; i < K; i += TG) {
            int bit = (ids[size_t(row) * size_t(K) + size_t(i)] + shift) / GRAIN;
            shared_or(marks[bit >> 5], 1u << (bit & 31));
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

                // drop: bit j is set where column + j is in the head.
                int bit = (column + shift) / GRAIN;
                uint drop = (shared_load(marks[bit >> 5]) >> (bit & 31)) & (GRAIN == 1 ? (1u << W) - 1u : 1u);
                if (GRAIN > 1 && drop != 0u) {
                    drop = 0u;
                    for (int e = 0; e < K; e++) {
                        uint j = uint(ids[size_t(row) * size_t(K) + size_t(e)] - column);
                        if (j < uint(W)) drop |= 1u << j;
                    }
                }

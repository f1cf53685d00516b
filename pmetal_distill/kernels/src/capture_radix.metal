        // Eight bits at a time from the top: four digits of the score's key, then three of 2^24 - 1 - id.
        if (lid == 0) {
            state[0] = 0u;
            state[1] = 0u;
            state[2] = uint(K);
            state[3] = 0u;
        }
        for (int digit = 0; digit < 7; digit++) {
            for (int i = lid; i < 256; i += TG) shared_store(bins[i], 0u);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            const uint known = state[0], known_id = state[1];
            const bool done = state[3] != 0u;
            if (!done) {
                for (int i = lid; i < V; i += TG) {
                    float x = float(in[i]);
                    uint key = x == x ? ordered_key(x) : 0u;
                    uint id = 0xffffffu - uint(i);
                    if (digit < 4) {
                        int low = 24 - 8 * digit;
                        if (digit == 0 || (key >> (low + 8)) == (known >> (low + 8)))
                            shared_add(bins[(key >> low) & 255u], 1u);
                    } else {
                        int low = 16 - 8 * (digit - 4);
                        if (key == known && (digit == 4 || (id >> (low + 8)) == (known_id >> (low + 8))))
                            shared_add(bins[(id >> low) & 255u], 1u);
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (lid == 0 && !done) {
                uint wanted = state[2];
                int bin = 255;
                while (bin > 0 && shared_load(bins[bin]) < wanted) {
                    wanted -= shared_load(bins[bin]);
                    bin--;
                }
                if (digit < 4) state[0] = known | (uint(bin) << (24 - 8 * digit));
                else state[1] = known_id | (uint(bin) << (16 - 8 * (digit - 4)));
                state[2] = wanted;
                state[3] = shared_load(bins[bin]) == wanted ? 1u : 0u;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        if (lid == 0) {
            state[1] = 0xffffffu - state[1];
            shared_store(counts[0], 0u);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

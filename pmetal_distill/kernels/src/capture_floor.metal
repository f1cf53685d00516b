            // The largest number that at least `wanted` of the maxima reach, to its upper bits.
            uint found = 0u, mine[TG / 16];
#pragma unroll
            for (int i = 0; i < TG / 16; i++) mine[i] = maxima[lane + 32 * i];
            for (int b = 31; b >= FLOOR_BIT; b--) {
                uint attempt = found | (1u << b), n = 0u;
#pragma unroll
                for (int i = 0; i < TG / 16; i++) n += mine[i] >= attempt ? 1u : 0u;
                if (simd_sum(n) >= wanted) found = attempt;
            }
            if (lane == 0) {
                state[0] = found <= BOTTOM_KEY ? 0u : found;  // groups without a score make no floor
                state[1] = 0xffffffffu;
            }

                // Lists those of x[0 ... count) that reach the floor and takes them out of x; `far` follows the others.
                uint hits = 0u;
#pragma unroll
                for (int j = 0; j < count; j++) hits |= x[j] >= limit ? 1u << j : 0u;
                if (floor_column != 0xffffffffu) {  // the floor is the K-th score itself: its equals count by id
#pragma unroll
                    for (int j = 0; j < count; j++) {
                        uint key = ordered_key(x[j]);
                        if (key <= floor_key && (key < floor_key || uint(first + j) > floor_column)) hits &= ~(1u << j);
                    }
                }
                if (hits != 0u) {
                    uint place = shared_add(counts[0], metal::popcount(hits));
#pragma unroll
                    for (int j = 0; j < count; j++) {
                        if ((hits & (1u << j)) != 0u) {
                            if (place < uint(CAP)) {
                                keys[place] = ordered_key(x[j]);
                                columns[place] = uint(first + j);
                            }
                            place++;
                            x[j] = BOTTOM;
                        }
                    }
                }
                far = larger(far, largest_of<count>(x));

                // Lists those of x[0 ... count) that reach the floor and takes them out of x; `far` follows the others.
#pragma unroll
                for (int j = 0; j < count; j++) {
                    if (x[j] >= limit) {
                        uint key = ordered_key(x[j]);
                        if (key > floor_key || (key == floor_key && uint(first + j) <= floor_column)) {
                            uint place = shared_add(counts[0], 1u);
                            if (place < uint(CAP)) {
                                keys[place] = key;
                                columns[place] = uint(first + j);
                            }
                            x[j] = BOTTOM;
                        }
                    }
                    far = larger(far, x[j]);
                }

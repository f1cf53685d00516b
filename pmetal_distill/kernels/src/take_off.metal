    // Coordinates less what token ids predict of them: rows of two tables of 16-bit numbers, added up and wrapped to 16
    // bits as the codec does, times `unit`. One threadgroup a token; a word holds two numbers.
    const size_t row = size_t(threadgroup_position_in_grid.x);
    const size_t words = size_t(D / 2);
    const size_t known = size_t(tokens[row]) * words;
    for (int j = int(thread_index_in_threadgroup); j < D / 2; j += TG) {
        uint pair = uint(token_table[known + size_t(j)]);
        uint low = pair, high = pair >> 16;
#pragma unroll 8
        for (int e = 0; e < K; e++) {
            pair = uint(head_table[size_t(ids[row * size_t(K) + size_t(e)]) * words + size_t(j)]);
            low += pair;
            high += pair >> 16;
        }
        const size_t at = row * size_t(D) + size_t(2 * j);
        left[at] = y[at] - float(int(low << 16) >> 16) * unit[0];
        left[at + 1] = y[at + 1] - float(int(high << 16) >> 16) * unit[0];
    }

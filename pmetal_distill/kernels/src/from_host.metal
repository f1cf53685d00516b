    // Copies words from memory of the host, given its address as two words and an offset in words. Every thread copies
    // one; there are as many threads as words.
    const uint at = uint(threadgroup_position_in_grid.x) * uint(TG) + uint(thread_index_in_threadgroup);
    const DEVICE uint* from = (const DEVICE uint*)(size_t(address[0]) | (size_t(address[1]) << 32));
    words[at] = from[uint(offset[0]) + at];

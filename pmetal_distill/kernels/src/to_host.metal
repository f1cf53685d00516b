    // Copies words to memory of the host, given its address as two words. Every thread copies one.
    const uint at = uint(threadgroup_position_in_grid.x) * uint(TG) + uint(thread_index_in_threadgroup);
    DEVICE uint* to = (DEVICE uint*)(size_t(address[0]) | (size_t(address[1]) << 32));
    if (at < uint(size[0])) to[at] = words[at];
    if (at == 0u) done[0] = 1u;

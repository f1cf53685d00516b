// Metal's side of the prelude. Bodies are written in Metal's own words; these are the few that differ elsewhere.
#define FN inline
#define DEVICE device
#define THREAD thread
#define SHARED(TYPE, NAME, COUNT) threadgroup TYPE NAME[COUNT]
#define SHARED_ATOMIC(NAME, COUNT) threadgroup metal::atomic_uint NAME[COUNT]

FN uint shared_add(threadgroup metal::atomic_uint& cell, uint value) {
    return metal::atomic_fetch_add_explicit(&cell, value, metal::memory_order_relaxed);
}
FN uint shared_or(threadgroup metal::atomic_uint& cell, uint value) {
    return metal::atomic_fetch_or_explicit(&cell, value, metal::memory_order_relaxed);
}
FN uint shared_load(threadgroup metal::atomic_uint& cell) {
    return metal::atomic_load_explicit(&cell, metal::memory_order_relaxed);
}
FN void shared_store(threadgroup metal::atomic_uint& cell, uint value) {
    metal::atomic_store_explicit(&cell, value, metal::memory_order_relaxed);
}

FN uint float_bits(float x) { return as_type<uint>(x); }
FN float bits_float(uint x) { return as_type<float>(x); }
FN float exp2_fast(float x) { return metal::fast::exp2(x); }
FN float log2_fast(float x) { return metal::fast::log2(x); }
FN float larger(float a, float b) { return metal::fmax(a, b); }
FN float smaller(float a, float b) { return metal::fmin(a, b); }

// Elements before the first one where a vector may be read; Apple GPUs read vectors at any element.
template <int W, typename T>
FN int lead_in(const DEVICE T*, int) { return 0; }

// W scores as they lie in memory.
template <typename T, int W>
struct Vector {
    T score[W];
};
template <int HINT, typename T, int W>
FN void read_vector(const DEVICE T* from, THREAD Vector<T, W>& v) {
#pragma unroll
    for (int j = 0; j < W; j++) v.score[j] = from[j];
}
template <typename T, int W>
FN void open_vector(const THREAD Vector<T, W>& v, THREAD float* x) {
#pragma unroll
    for (int j = 0; j < W; j++) x[j] = float(v.score[j]);
}
template <int W, int HINT, typename T>
FN void write_scores(DEVICE T* to, const THREAD float* x) {
#pragma unroll
    for (int j = 0; j < W; j++) to[j] = T(x[j]);
}

// The host's side of the prelude: Metal's words on top of the emulation.
#pragma once
#include "emulator.hpp"

#define DEVICE
#define THREAD
#define FN static inline
#define SHARED(TYPE, NAME, COUNT) emulator::Shared<TYPE> NAME{&emulator::allocate(#NAME, size_t(COUNT))}
#define SHARED_ATOMIC(NAME, COUNT) SHARED(uint, NAME, COUNT)

#define threadgroup_position_in_grid (emulator::G.position)
#define threads_per_threadgroup (emulator::G.threads)
#define thread_index_in_threadgroup (uint(emulator::G.current))
#define thread_index_in_simdgroup (uint(emulator::G.current) & 31u)
#define simdgroup_index_in_threadgroup (uint(emulator::G.current) >> 5)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
#define threadgroup_barrier(flags) emulator::barrier(__COUNTER__)

FN uint shared_add(emulator::Cell<uint> cell, uint value) {
    uint& word = emulator::touch(*cell.array, cell.index, true, true).value;
    uint old = word;
    word += value;
    return old;
}
FN uint shared_or(emulator::Cell<uint> cell, uint value) {
    uint& word = emulator::touch(*cell.array, cell.index, true, true).value;
    uint old = word;
    word |= value;
    return old;
}
FN uint shared_load(emulator::Cell<uint> cell) { return cell; }
FN void shared_store(emulator::Cell<uint> cell, uint value) { cell = value; }

FN float simd_sum_at(float x, int site) { return emulator::simd(emulator::Op::sum_float, x, site); }
FN float simd_max_at(float x, int site) { return emulator::simd(emulator::Op::max_float, x, site); }
FN uint simd_sum_at(uint x, int site) { return emulator::simd(emulator::Op::sum_uint, x, site); }
FN uint simd_max_at(uint x, int site) { return emulator::simd(emulator::Op::max_uint, x, site); }
#define simd_sum(x) simd_sum_at(x, __COUNTER__)
#define simd_max(x) simd_max_at(x, __COUNTER__)

namespace metal {
FN float log(float x) { return ::logf(x); }
FN float log2(float x) { return ::log2f(x); }
FN float fabs(float x) { return ::fabsf(x); }
FN uint popcount(uint x) { return uint(__builtin_popcount(x)); }
FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
}  // namespace metal

FN uint float_bits(float x) {
    uint u;
    memcpy(&u, &x, 4);
    return u;
}
FN float bits_float(uint u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}
FN float exp2_fast(float x) { return ::exp2f(x); }
FN float log2_fast(float x) { return ::log2f(x); }
FN float larger(float a, float b) { return ::fmaxf(a, b); }
FN float smaller(float a, float b) { return ::fminf(a, b); }

// As on CUDA, where vectors must be aligned: the loads below check it.
template <int W, typename T>
FN int lead_in(const T* row, int length) {
    constexpr size_t bytes = W * sizeof(T);
    size_t over = reinterpret_cast<size_t>(row) & (bytes - 1);
    int lead = over == 0 ? 0 : int((bytes - over) / sizeof(T));
    return lead < length ? lead : length;
}

template <typename T, int W>
struct Vector {
    T score[W];
};
template <int HINT, typename T, int W>
FN void read_vector(const T* from, Vector<T, W>& v) {
    if (reinterpret_cast<size_t>(from) % (W * sizeof(T))) emulator::fail("%s vector read at an unaligned address", "a");
    for (int j = 0; j < W; j++) v.score[j] = from[j];
}
template <typename T, int W>
FN void open_vector(const Vector<T, W>& v, float* x) {
    for (int j = 0; j < W; j++) x[j] = float(v.score[j]);
}
template <int W, int HINT, typename T>
FN void write_scores(T* to, const float* x) {
    if (reinterpret_cast<size_t>(to) % (W * sizeof(T))) emulator::fail("%s vector written at an unaligned address", "a");
    for (int j = 0; j < W; j++) to[j] = T(x[j]);
}

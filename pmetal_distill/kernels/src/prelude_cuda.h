// CUDA's side of the prelude: Metal's words for NVRTC, and 16-byte loads and stores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint;
#define DEVICE
#define THREAD
#define FN __device__ __forceinline__
#define SHARED(TYPE, NAME, COUNT) __shared__ TYPE NAME[COUNT]
#define SHARED_ATOMIC(NAME, COUNT) __shared__ uint NAME[COUNT]

#define threadgroup_position_in_grid blockIdx
#define threads_per_threadgroup blockDim
#define thread_index_in_threadgroup threadIdx.x
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)

struct mem_flags {
    enum kind { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_both = 3 };
};
FN void threadgroup_barrier(mem_flags::kind) { __syncthreads(); }

FN uint shared_add(uint& cell, uint value) { return atomicAdd(&cell, value); }
FN uint shared_or(uint& cell, uint value) { return atomicOr(&cell, value); }
FN uint shared_load(uint& cell) { return cell; }
FN void shared_store(uint& cell, uint value) { cell = value; }

FN float simd_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
FN float simd_max(float x) {
#pragma unroll
    for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}
#if __CUDA_ARCH__ >= 800
FN uint simd_sum(uint x) { return __reduce_add_sync(0xffffffffu, x); }
FN uint simd_max(uint x) { return __reduce_max_sync(0xffffffffu, x); }
#else
FN uint simd_sum(uint x) {
    for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}
FN uint simd_max(uint x) {
    for (int d = 16; d > 0; d >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}
#endif

namespace metal {
FN float log(float x) { return logf(x); }
FN float log2(float x) { return log2f(x); }
FN float fabs(float x) { return fabsf(x); }
FN float fma(float a, float b, float c) { return fmaf(a, b, c); }
FN uint popcount(uint x) { return __popc(x); }
FN int min(int a, int b) { return a < b ? a : b; }
}  // namespace metal

FN uint float_bits(float x) { return __float_as_uint(x); }
FN float bits_float(uint x) { return __uint_as_float(x); }
FN float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FN float log2_fast(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
FN float larger(float a, float b) { return fmaxf(a, b); }
FN float smaller(float a, float b) { return fminf(a, b); }

// Elements before the first one where a vector of W may be read.
template <int W, typename T>
FN int lead_in(const T* row, int length) {
    constexpr uint bytes = W * sizeof(T);
    uint over = uint(reinterpret_cast<unsigned long long>(row)) & (bytes - 1);
    int lead = over == 0 ? 0 : int((bytes - over) / sizeof(T));
    return lead < length ? lead : length;
}

// HINT 0: default caching. 1: read or written once, evict first.
template <int HINT>
FN uint4 load_words(const uint4* from) { return HINT == 1 ? __ldcs(from) : __ldg(from); }
template <int HINT>
FN uint2 load_words(const uint2* from) { return HINT == 1 ? __ldcs(from) : __ldg(from); }
template <int HINT, typename Words>
FN void store_words(Words* to, Words w) {
    if (HINT == 1) __stcs(to, w); else *to = w;
}

FN void unpack(uint w, THREAD float* x, float) { x[0] = __uint_as_float(w); }
FN void unpack(uint w, THREAD float* x, __nv_bfloat16) {
    x[0] = __uint_as_float(w << 16);
    x[1] = __uint_as_float(w & 0xffff0000u);
}
FN void unpack(uint w, THREAD float* x, __half) {
    float2 pair = __half22float2(*reinterpret_cast<__half2*>(&w));
    x[0] = pair.x;
    x[1] = pair.y;
}
FN uint pack(const THREAD float* x, __nv_bfloat16) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
    return *reinterpret_cast<uint*>(&pair);
}
FN uint pack(const THREAD float* x, __half) {
    __half2 pair = __floats2half2_rn(x[0], x[1]);
    return *reinterpret_cast<uint*>(&pair);
}

// W scores as they lie in memory.
template <typename T, int W>
struct Vector {
    uint words[W * sizeof(T) / 4];
};
template <int HINT, typename T, int W>
FN void read_vector(const T* from, Vector<T, W>& v) {
    constexpr int count = W * sizeof(T) / 4;
    if (count == 2) {
        uint2 w = load_words<HINT>(reinterpret_cast<const uint2*>(from));
        v.words[0] = w.x;
        v.words[1] = w.y;
        return;
    }
#pragma unroll
    for (int i = 0; i + 4 <= count; i += 4) {
        uint4 w = load_words<HINT>(reinterpret_cast<const uint4*>(from) + i / 4);
        v.words[i] = w.x;
        v.words[i + 1] = w.y;
        v.words[i + 2] = w.z;
        v.words[i + 3] = w.w;
    }
}
template <typename T, int W>
FN void open_vector(const Vector<T, W>& v, THREAD float* x) {
#pragma unroll
    for (int i = 0; i < int(W * sizeof(T) / 4); i++) unpack(v.words[i], x + i * (4 / sizeof(T)), T());
}

template <int W, int HINT>
FN void write_scores(float* to, const THREAD float* x) {
#pragma unroll
    for (int j = 0; j < W; j += 4) {
        uint4 w = make_uint4(__float_as_uint(x[j]), __float_as_uint(x[j + 1]), __float_as_uint(x[j + 2]),
                             __float_as_uint(x[j + 3]));
        store_words<HINT>(reinterpret_cast<uint4*>(to + j), w);
    }
}
template <int W, int HINT, typename T>
FN void write_scores(T* to, const THREAD float* x) {
    if (W == 4) {
        store_words<HINT>(reinterpret_cast<uint2*>(to), make_uint2(pack(x, T()), pack(x + 2, T())));
        return;
    }
#pragma unroll
    for (int j = 0; j + 8 <= W; j += 8) {
        uint4 w = make_uint4(pack(x + j, T()), pack(x + j + 2, T()), pack(x + j + 4, T()), pack(x + j + 6, T()));
        store_words<HINT>(reinterpret_cast<uint4*>(to + j), w);
    }
}

// Two scores to a word: `Extremes` of common.h with half the instructions.
template <typename T> struct Extremes;
template <> struct Extremes<__half> { uint high, low, limit; };
template <> struct Extremes<__nv_bfloat16> { uint high, low, limit; };

FN uint twice(float x, __half) {
    __half2 pair = __half2half2(__float2half_rd(x));
    return *reinterpret_cast<uint*>(&pair);
}
FN uint twice(float x, __nv_bfloat16) {
    __nv_bfloat162 pair = __bfloat162bfloat162(__float2bfloat16_rd(x));
    return *reinterpret_cast<uint*>(&pair);
}
#define PAIRWISE(PAIR, T) \
    FN uint larger_pair(uint a, uint b, T) { \
        PAIR m = __hmax2(*reinterpret_cast<PAIR*>(&a), *reinterpret_cast<PAIR*>(&b)); \
        return *reinterpret_cast<uint*>(&m); \
    } \
    FN uint smaller_pair(uint a, uint b, T) { \
        PAIR m = __hmin2(*reinterpret_cast<PAIR*>(&a), *reinterpret_cast<PAIR*>(&b)); \
        return *reinterpret_cast<uint*>(&m); \
    } \
    FN bool any_reaches(uint a, uint b, T) { \
        return __hge2_mask(*reinterpret_cast<PAIR*>(&a), *reinterpret_cast<PAIR*>(&b)) != 0u; \
    } \
    FN void start_extremes(Extremes<T>& e, float limit) { \
        e.high = twice(bits_float(0xff800000u), T()); \
        e.low = twice(bits_float(0x7f800000u), T()); \
        e.limit = twice(limit, T()); \
    } \
    template <int W> \
    FN bool all_below(Extremes<T>& e, const Vector<T, W>& v, const float*) { \
        uint most = v.words[0]; \
        e.low = smaller_pair(e.low, v.words[0], T()); \
        _Pragma("unroll") for (int i = 1; i < W / 2; i++) { \
            most = larger_pair(most, v.words[i], T()); \
            e.low = smaller_pair(e.low, v.words[i], T()); \
        } \
        if (any_reaches(most, e.limit, T())) return false; \
        e.high = larger_pair(e.high, most, T()); \
        return true; \
    } \
    FN float highest(const Extremes<T>& e) { \
        float x[2]; \
        unpack(e.high, x, T()); \
        return fmaxf(x[0], x[1]); \
    } \
    FN float lowest_of(const Extremes<T>& e) { \
        float x[2]; \
        unpack(e.low, x, T()); \
        return fminf(x[0], x[1]); \
    }
PAIRWISE(__half2, __half)
PAIRWISE(__nv_bfloat162, __nv_bfloat16)

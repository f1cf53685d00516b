// Enough of Metal's library, as declarations, for a C++ front end to check types and address spaces of generated
// kernels: a pointer into one address space does not convert to another, as in Metal.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

typedef unsigned int uint;
typedef unsigned short ushort;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef unsigned long size_t;
typedef _Float16 half;
typedef half float16_t;
typedef __bf16 bfloat16_t;
struct uint3 { uint x, y, z; };

template <typename To, typename From>
To as_type(From value);

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
enum memory_order { memory_order_relaxed };
enum atomic_uint : uint {};  // a type of its own, without constructors
uint atomic_fetch_add_explicit(threadgroup atomic_uint*, uint, memory_order);
uint atomic_fetch_or_explicit(threadgroup atomic_uint*, uint, memory_order);
uint atomic_load_explicit(const threadgroup atomic_uint*, memory_order);
void atomic_store_explicit(threadgroup atomic_uint*, uint, memory_order);
void threadgroup_barrier(mem_flags);
float simd_sum(float);
uint simd_sum(uint);
float simd_max(float);
uint simd_max(uint);
float log(float);
float log2(float);
float fabs(float);
float fmax(float, float);
float fma(float, float, float);
uint popcount(uint);
float fmin(float, float);
namespace fast {
float exp2(float);
float log2(float);
}  // namespace fast
}  // namespace metal
using namespace metal;

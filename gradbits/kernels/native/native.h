// The native kernels: what the translation units of one library share.
//
// Every kernel body (*.inl) is compiled once per instruction set, by avx512.cpp, avx2.cpp and portable.cpp, and reached
// through the table of function pointers below; api.cpp picks a table by what the processor has. The bodies use no C++
// library: an inline function of it, compiled for AVX-512, could be the copy that the linker keeps for everyone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef GB_STAMP
#define GB_STAMP "unknown"
#endif

enum { GB_FLOAT32 = 0, GB_BFLOAT16 = 1, GB_FLOAT16 = 2 };  // dtypes, as Python numbers them
enum { GB_NEAREST = 0, GB_KEYED = 1, GB_EXPLICIT = 2 };    // where rounding noise comes from
enum { GB_OK = 0, GB_NO_MEMORY = 1 };                      // what a kernel returns

// Values [outer, count, inner] in memory order; r, a and z hold `count` entries, or one where count is 1.
struct QuantizeArgs {
    const void* x;
    int8_t* codes;
    int64_t outer, count, inner;
    const float *r, *a, *z, *noise;
    float low, high;
    int32_t dtype, mode, k0, k1, threads;
};

struct RangeArgs {
    const void* x;
    float *low, *high;  // `count` entries each
    int64_t outer, count, inner;
    int32_t dtype, threads;
};

struct Kernels {
    const char* name;
    int (*quantize)(const QuantizeArgs*);
    int (*range)(const RangeArgs*);
};

extern const Kernels gb_avx512, gb_avx2, gb_portable;

// Run `body(data)` on `threads` threads of the pool that PyTorch uses; bodies take their share from a counter.
void gb_parallel(int threads, void (*body)(void*), void* data);

static inline int64_t gb_take(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// The C interface: what Python calls, which instruction set serves it, and the threads.
#include "native.h"
#include "isa.h"

#if GB_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
Parallel pool = nullptr;  // the OpenMP entry point of the library that PyTorch has loaded

const Kernels* table(int level) {
    return level == 3 ? &gb_amx : level == 2 ? &gb_avx512 : level == 1 ? &gb_avx2 : &gb_portable;
}

// Whether there is a matrix unit for bytes, and the system lets this process use it once it is asked.
bool has_amx() {
#if GB_AMX
    const unsigned tile = 1u << 24, int8 = 1u << 25;
    const long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & int8) &&
           syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
    return false;
#endif
}

}  // namespace

void gb_parallel(int threads, void (*body)(void*), void* data) {
    if (threads > 1 && pool)
        pool(body, data, (unsigned)threads, 0);
    else
        body(data);
}

#define GB_API __attribute__((visibility("default")))

extern "C" {

GB_API const char* gradbits_stamp() { return GB_STAMP; }

// Threads come from PyTorch's own OpenMP library, whichever that is: a second pool would halve the speed of both.
GB_API void gradbits_set_pool(void* parallel) { pool = (Parallel)parallel; }

// 3: AVX-512 with VNNI and AMX, 2: AVX-512 with VNNI, 1: AVX2, 0: portable.
GB_API int gradbits_level() {
#if GB_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma"))
        return has_amx() ? 3 : 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

GB_API const char* gradbits_name(int level) { return table(level)->name; }

GB_API int gradbits_quantize(int level, const QuantizeArgs* args) { return table(level)->quantize(args); }

GB_API int gradbits_range(int level, const RangeArgs* args) { return table(level)->range(args); }

GB_API int gradbits_symmetric(int level, const SymmetricArgs* args) { return table(level)->symmetric(args); }

GB_API int gradbits_rows(int level, const ProductArgs* args) { return table(level)->rows(args); }

GB_API int gradbits_columns(int level, const ProductArgs* args) { return table(level)->columns(args); }

GB_API int gradbits_finish(int level, const FinishArgs* args) { return table(level)->finish(args); }

GB_API int gradbits_depth_rows(int level, const ProductArgs* args) { return table(level)->depth_rows(args); }

GB_API int gradbits_depth_columns(int level, const ProductArgs* args) { return table(level)->depth_columns(args); }

GB_API int gradbits_pack(int level, const PackArgs* args) { return table(level)->pack(args); }

GB_API int gradbits_unpack(int level, const PackArgs* args) { return table(level)->unpack(args); }

GB_API int gradbits_sums(int level, const SumsArgs* args) { return table(level)->sums(args); }

GB_API int gradbits_norm(int level, const NormArgs* args) { return table(level)->norm(args); }

GB_API int gradbits_gelu(int level, const GeluArgs* args) { return table(level)->gelu(args); }

GB_API int gradbits_column_sums(int level, const ColumnSumsArgs* args) { return table(level)->column_sums(args); }

GB_API int gradbits_digest(int level, const DigestArgs* args) { return table(level)->digest(args); }

GB_API int gradbits_attention(int level, const AttentionArgs* args) { return table(level)->attention(args); }
}

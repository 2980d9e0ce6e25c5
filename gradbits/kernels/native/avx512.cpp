// The kernels for processors with AVX-512 and its int8 dot products (VNNI), and for those that have a matrix unit (AMX) too.
#include "native.h"
#include "isa.h"

#if GB_X86
#define GB_ISA avx512
#define GB_VNNI 1
GB_BEGIN_WIDE("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "bodies.inl"
GB_END
#undef GB_VNNI
#define GB_TABLE(name, rows, columns)                                                                                 \
    {name, avx512::quantize, avx512::range, avx512::symmetric, avx512::rows, avx512::columns, avx512::finish_sums,    \
     avx512::depth_rows, avx512::depth_columns, avx512::pack, avx512::unpack, avx512::sums, avx512::norm, avx512::gelu, \
     avx512::column_sums, avx512::digest, avx512::attention}
const Kernels gb_avx512 = GB_TABLE("avx512_vnni", rows, columns);
#if GB_AMX
const Kernels gb_amx = GB_TABLE("avx512_amx", amx_rows, amx_columns);
#else
const Kernels gb_amx = {};
#endif
#else
const Kernels gb_avx512 = {}, gb_amx = {};
#endif

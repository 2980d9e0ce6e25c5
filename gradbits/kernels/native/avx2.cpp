// The kernels for processors with AVX2.
#include "native.h"
#include "isa.h"

#if GB_X86
#define GB_ISA avx2
GB_BEGIN("avx2")
#include "bodies.inl"
GB_END
const Kernels gb_avx2 = {"avx2", avx2::quantize, avx2::range, avx2::symmetric, avx2::rows, avx2::columns, avx2::finish_sums, avx2::depth_rows, avx2::depth_columns,
                            avx2::pack, avx2::unpack, avx2::sums, avx2::norm, avx2::gelu, avx2::column_sums, avx2::digest, avx2::attention};
#else
const Kernels gb_avx2 = {};
#endif

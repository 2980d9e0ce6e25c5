// The kernels of the wire for processors with AVX2.
#include "wire.h"
#include "isa.h"

#if GB_X86
#define GB_ISA wire_avx2
GB_BEGIN("avx2")
#include "wire_bodies.inl"
GB_END
const WireKernels gb_wire_avx2 = wire_avx2::wire;
#else
const WireKernels gb_wire_avx2 = {};
#endif

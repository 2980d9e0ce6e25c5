// The kernels of the wire for processors with AVX-512.
#include "wire.h"
#include "isa.h"

#if GB_X86
#define GB_ISA wire_avx512
#define GB_VNNI 1
GB_BEGIN_WIDE("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include "wire_bodies.inl"
GB_END
const WireKernels gb_wire_avx512 = wire_avx512::wire;
#else
const WireKernels gb_wire_avx512 = {};
#endif

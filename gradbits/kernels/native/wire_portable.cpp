// The kernels of the wire for every other processor: plain C++.
#include "wire.h"
#include "isa.h"

#define GB_ISA wire_portable
#include "wire_bodies.inl"
const WireKernels gb_wire_portable = wire_portable::wire;

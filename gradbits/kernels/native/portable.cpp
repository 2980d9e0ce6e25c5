// The kernels for every other processor: plain C++.
#include "native.h"
#include "isa.h"

#define GB_ISA portable
#include "bodies.inl"
const Kernels gb_portable = {"portable", portable::quantize, portable::range, portable::symmetric, portable::rows, portable::columns, portable::finish_sums, portable::depth_rows, portable::depth_columns,
                            portable::pack, portable::unpack, portable::sums, portable::norm, portable::gelu, portable::column_sums, portable::digest, portable::attention};

// The C interface to the kernels of the wire; see api.cpp.
#include "wire.h"
#include "isa.h"

namespace {

const WireKernels* table(int level) {
    return level == 2 ? &gb_wire_avx512 : level == 1 ? &gb_wire_avx2 : &gb_wire_portable;
}

}  // namespace

#define GB_API __attribute__((visibility("default")))

extern "C" {

GB_API int gradbits_huffman_encode(int level, const HuffmanArgs* args) { return table(level)->huffman_encode(args); }

GB_API int gradbits_huffman_decode(int level, const HuffmanArgs* args) { return table(level)->huffman_decode(args); }

GB_API int gradbits_count(int level, const CountArgs* args) { return table(level)->count(args); }
}

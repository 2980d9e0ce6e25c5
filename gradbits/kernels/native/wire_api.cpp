// The C interface to the kernels of the wire; see api.cpp.
#include "wire.h"
#include "isa.h"

namespace {

const WireKernels* table(int level) {
    return level >= 2 ? &gb_wire_avx512 : level == 1 ? &gb_wire_avx2 : &gb_wire_portable;
}

}  // namespace

#define GB_API __attribute__((visibility("default")))

extern "C" {

GB_API int gradbits_huffman_encode(int level, const HuffmanArgs* args) { return table(level)->huffman_encode(args); }

GB_API int gradbits_huffman_decode(int level, const HuffmanArgs* args) { return table(level)->huffman_decode(args); }

GB_API int gradbits_count(int level, const CountArgs* args) { return table(level)->count(args); }

GB_API int gradbits_pack_symbols(int level, const SymbolsArgs* args) { return table(level)->pack_symbols(args); }

GB_API int gradbits_unpack_symbols(int level, const SymbolsArgs* args) { return table(level)->unpack_symbols(args); }

GB_API int gradbits_bucket_norms(int level, const BucketArgs* args) { return table(level)->bucket_norms(args); }

GB_API int gradbits_encode_buckets(int level, const BucketArgs* args) { return table(level)->encode_buckets(args); }

GB_API int gradbits_decode_buckets(int level, const BucketArgs* args) { return table(level)->decode_buckets(args); }
}

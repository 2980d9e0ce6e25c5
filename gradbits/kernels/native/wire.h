// The kernels of the wire: what their translation units share. The scheme is that of native.h.
#pragma once

#include "native.h"

static const int GB_BAD_DATA = 2;  // what a kernel returns, beside GB_OK: symbols without a code, a damaged stream

// `count` symbols (bytes) in streams of `chunk`; stream i has sizes[i] bytes of `payload`, its codes are canonical.
struct HuffmanArgs {
    uint8_t* symbols;
    const uint8_t* lengths;  // of the `alphabet` codes; at most 256
    uint32_t* sizes;
    uint8_t* payload;
    void* work;  // decoding: tables and positions
    int64_t count, chunk, bytes;
    int32_t alphabet, threads;
};

// How often each of the 256 bytes occurs among `count` symbols.
struct CountArgs {
    const uint8_t* symbols;
    int64_t* counts;
    int64_t count;
    int32_t alphabet, threads;
};

// `count` symbols of `bits` bits, one a byte, and without gaps.
struct SymbolsArgs {
    uint8_t *symbols, *packed;
    int64_t count;
    int32_t bits, threads;
};

enum { GB_GIVEN = 0, GB_MAX = 1, GB_L2 = 2 };  // where norms of buckets come from

// `count` values in buckets, see gradbits/kernels/buckets.py; `mode` of the noise as in QuantizeArgs.
struct BucketArgs {
    const float *x, *levels, *noise;
    float *norms, *out;
    uint8_t* packed;
    int64_t count, bucket;
    int32_t level_count, bits, order, mode, k0, k1, add, threads;
};

struct WireKernels {
    int (*huffman_encode)(const HuffmanArgs*);
    int (*huffman_decode)(const HuffmanArgs*);
    int (*count)(const CountArgs*);
    int (*pack_symbols)(const SymbolsArgs*);
    int (*unpack_symbols)(const SymbolsArgs*);
    int (*bucket_norms)(const BucketArgs*);
    int (*encode_buckets)(const BucketArgs*);
    int (*decode_buckets)(const BucketArgs*);
};

extern const WireKernels gb_wire_avx512, gb_wire_avx2, gb_wire_portable;

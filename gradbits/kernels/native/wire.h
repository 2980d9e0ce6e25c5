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

struct WireKernels {
    int (*huffman_encode)(const HuffmanArgs*);
    int (*huffman_decode)(const HuffmanArgs*);
    int (*count)(const CountArgs*);
};

extern const WireKernels gb_wire_avx512, gb_wire_avx2, gb_wire_portable;

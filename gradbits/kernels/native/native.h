// The native kernels: what the translation units of one library share.
//
// Every kernel body (*.inl) is compiled once per instruction set, by avx512.cpp, avx2.cpp and portable.cpp, and reached
// through the table of function pointers below; api.cpp picks a table by what the processor has. The bodies use no C++
// library: an inline function of it, compiled for AVX-512, could be the copy that the linker keeps for everyone.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef GB_STAMP
#define GB_STAMP "unknown"
#endif

enum { GB_FLOAT32 = 0, GB_BFLOAT16 = 1, GB_FLOAT16 = 2 };  // dtypes, as Python numbers them
enum { GB_NEAREST = 0, GB_KEYED = 1, GB_EXPLICIT = 2 };    // where rounding noise comes from
enum { GB_OK = 0, GB_NO_MEMORY = 1 };                      // what a kernel returns

// Values [outer, count, inner] in memory order; r, a and z hold `count` entries, or one where count is 1.
struct QuantizeArgs {
    const void* x;
    int8_t* codes;
    int64_t outer, count, inner;
    const float *r, *a, *z, *noise;
    float low, high;
    int32_t dtype, mode, k0, k1, threads;
};

// One symmetric scale for all of x, which the kernel finds: r, low and high of `quantize` are not read.
struct SymmetricArgs {
    QuantizeArgs quantize;
    const float* width;  // the largest magnitude of x where it is known, or null
    float* found;        // scale, lowest and highest value of the range
    float largest;       // code
};

struct RangeArgs {
    const void* x;
    float *low, *high;  // `count` entries each
    int64_t outer, count, inner;
    int32_t dtype, threads;
};

// A float32 operand of the epilogue: one stride for each axis of the result, 0 where it is the same along it.
struct Operand {
    const float* values;
    int64_t group, sample, position, channel;
};

enum { GB_TERMS = 6 };

enum { GB_NO_ACTIVATION = 0, GB_RELU = 1, GB_GELU = 2 };  // 3 is a GELU too: the curve makes the difference
enum { GB_GELU_TOP = 7, GB_GELU_BOTTOM = 6 };              // coefficients of its curve, numerator and denominator

// y = float(sum) * scale + terms[0] + terms[1] + ..., every operation rounded once; then the activation.
struct Epilogue {
    Operand scale, terms[GB_TERMS];
    int32_t count, dtype, activation;  // terms in use; dtype of the result
    float end;                         // of the curve
    const float* curve;
};

// Sums over patches of x [samples, channels, 3 axes]; a matrix product has one sample and one tap. At most 131071 terms
// in a sum of the first; the second takes any number.
// `output` and `grad_input`: result[group, sample, position, n] = sum over taps and c of x[patch] * w[group, n, tap, c].
// `grad_weight`: result[group, n, tap, c] = sum over samples and positions of w[sample, position, group, n] * x[patch].
struct ProductArgs {
    const int8_t *x, *w;
    void* result;
    int64_t groups, samples, channels, columns;      // channels and columns are those of one group
    int64_t size[3], count[3], taps[3];              // of the input, of the positions, of the kernel
    int64_t stride[3], padding[3], dilation[3];      // padding is that at the low end, negative: cropping
    int64_t x_group, x_sample, x_channel, x_axis[3];
    int64_t w_group, w_column, w_channel, w_tap[3];  // for grad_weight w_channel is the samples', w_tap the positions'
    int64_t r_group, r_sample, r_position, r_channel;  // strides of the result
    int64_t first, step[3];                            // index of a position: first + sum of its coordinates * step
    Epilogue epilogue;
    int32_t threads;
};

// Sums [count[2], columns] of a product, which get its epilogue; the result may be where they are. What lies behind the
// last row may be read, up to 60 bytes of it.
struct FinishArgs {
    const int32_t* sums;
    ProductArgs product;
};

// `count` codes of 2 or 4 bits (`width`), the first in the lowest bits of a byte.
struct PackArgs {
    const void* from;
    void* to;
    int64_t count;
    int32_t width, threads;
};

// Codes [outer, count, inner] in memory order, summed over `count` of them.
struct SumsArgs {
    const int8_t* x;
    int32_t* sums;  // [outer, inner]
    int64_t outer, count, inner;
    int32_t threads;
};

// A digest of `bytes` bytes; `pieces` is room for one number of each 2^18 of them.
struct DigestArgs {
    const void* x;
    uint64_t *pieces, *digest;
    int64_t bytes;
    int32_t threads;
};

// Batch norm with shortcut and ReLU on `total` values whose channels are last in memory.
struct NormArgs {
    const void *x, *other, *g;  // its input, the shortcut or null, the gradient of the result
    void *y, *rest;             // result, or gradient of x; gradient of the shortcut or null
    uint8_t* mask;              // which results are positive
    const float *weight, *bias;  // or null
    float *mean, *inverse, *var;  // of the batch they are written (forward), else read; inverse: of the deviation
    double* totals;               // [2, channels]; backward: gradients of bias and weight
    float* widest;                // largest magnitude of y
    float* room;                  // 4 rows of lanes, and 2 for each task
    int64_t total, channels, lanes, size;  // a row of `lanes` values, a multiple of channels; a task has `size` rows
    float eps;
    int32_t of_batch, dtype, backward, threads;
};

// GELU of `total` values, or the gradient of x where g is given.
struct GeluArgs {
    const void *x, *g;
    void* y;
    float* widest;  // largest magnitude of y
    int64_t total;
    float curve[GB_GELU_TOP + GB_GELU_BOTTOM], end;
    int32_t dtype, threads;
};

// Sums of the columns of x; `room`: a row for each 64 rows of x, the first receives the sums.
struct ColumnSumsArgs {
    const void* x;
    float *room, *widest;  // widest: largest magnitude of x
    int64_t rows, columns;
    int32_t dtype, threads;
};

// Rows of heads of samples: where the first is and how far they lie apart; what a row holds is adjacent.
struct Rows {
    void* at;
    int64_t batch, head, row;
};

// Attention of `batch` samples of `heads` heads, or its gradients where `gradient` is there: then the codes, scales, tops
// and sums of the forward pass are read. Rows are in `dtype`; codes are [head of all][row][width].
struct AttentionArgs {
    Rows query, key, value, output, gradient, grad_query, grad_key, grad_value;
    int8_t *query_codes, *key_codes, *value_codes;
    float* scales;  // [3][head of all]
    int32_t* tops;  // [head of all][query], and
    int64_t* sums;
    int64_t batch, heads, queries, keys, width, value_width;
    float scale, steepness;
    int32_t gradient_noise[2], slope_noise[2];
    int32_t dtype, causal, threads;
};

struct Kernels {
    const char* name;
    int (*quantize)(const QuantizeArgs*);
    int (*range)(const RangeArgs*);
    int (*symmetric)(const SymmetricArgs*);
    int (*rows)(const ProductArgs*);
    int (*columns)(const ProductArgs*);
    int (*finish)(const FinishArgs*);
    int (*depth_rows)(const ProductArgs*);     // rows and columns where groups have one channel and one column, and
    int (*depth_columns)(const ProductArgs*);  // x_group (for columns w_group too) is 1
    int (*pack)(const PackArgs*);
    int (*unpack)(const PackArgs*);
    int (*sums)(const SumsArgs*);
    int (*norm)(const NormArgs*);
    int (*gelu)(const GeluArgs*);
    int (*column_sums)(const ColumnSumsArgs*);
    int (*digest)(const DigestArgs*);
    int (*attention)(const AttentionArgs*);
};

extern const Kernels gb_amx, gb_avx512, gb_avx2, gb_portable;

// Run `body(data)` on `threads` threads of the pool that PyTorch uses; bodies take their share from a counter.
void gb_parallel(int threads, void (*body)(void*), void* data);

static inline int64_t gb_take(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// The same from the last of `count` to the first, then a negative number: a second pass over memory begins with what the
// first has left in the caches.
static inline int64_t gb_take_back(int64_t* counter, int64_t count) { return count - 1 - gb_take(counter); }

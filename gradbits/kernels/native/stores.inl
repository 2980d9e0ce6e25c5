// Floats to where they belong in a result: their dtype, and blocks of them turned where positions are adjacent.

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int64_t Longs __attribute__((vector_size(128)));

// Where a row of sums belongs: its offset in the result, and what the strides of operands are multiplied with.
struct Where {
    int64_t to, sample, position;
};

GB_INLINE Floats floats_of(const int32_t* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof words);
    return __builtin_convertvector(words, Floats);
}

GB_INLINE Floats floats_of(const int64_t* from) {
    Longs longs;
    __builtin_memcpy(&longs, from, sizeof longs);
    return __builtin_convertvector(longs, Floats);
}

GB_INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

GB_INLINE Halves to_bf16(Floats y) {
    Bits bits, odd = (Bits)(y != y);
    __builtin_memcpy(&bits, &y, sizeof bits);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return __builtin_convertvector((odd & 0x7fc0u) | (~odd & bits), Halves);
}

// What finish need not find out again: UNIFORM, every position takes the same scale and terms; STREAM, the result is
// too large for the caches, so that reading its lines before they are overwritten would be in vain.
enum { UNIFORM = 1, STREAM = 2 };

static int ways(const ProductArgs* p, int64_t elements) {
    const Epilogue* e = &p->epilogue;
    bool uniform = e->scale.sample == 0 && e->scale.position == 0;
    for (int t = 0; t < e->count; t++) uniform = uniform && e->terms[t].sample == 0 && e->terms[t].position == 0;
    return (uniform ? UNIFORM : 0) | (elements > (1 << 20) ? STREAM : 0);
}

// Makes streamed stores visible to other threads.
GB_INLINE void flush() {
#ifdef GB_VNNI
    _mm_sfence();
#endif
}

// n floats to the result, `step` apart.
GB_INLINE void put_floats(const ProductArgs* p, int64_t to, int64_t step, Floats y, int n, int how) {
    if (p->epilogue.dtype == GB_FLOAT32) {
        float* at = (float*)p->result + to;
        if (step == 1 && n == 16) {
#ifdef GB_VNNI
            if ((how & STREAM) && ((uintptr_t)at & 63) == 0) {
                _mm512_stream_ps(at, (__m512)y);
                return;
            }
#endif
            __builtin_memcpy(at, &y, sizeof y);
            return;
        }
#ifdef GB_VNNI
        if (step == 1) {
            _mm512_mask_storeu_ps(at, (__mmask16)((1u << n) - 1), (__m512)y);
            return;
        }
#endif
        for (int i = 0; i < n; i++) at[i * step] = y[i];
    } else {
        uint16_t* at = (uint16_t*)p->result + to;
        Halves half = to_bf16(y);
        if (step == 1 && n == 16)
            __builtin_memcpy(at, &half, sizeof half);
        else
            for (int i = 0; i < n; i++) at[i * step] = half[i];
    }
    (void)how;
}

// Turn 16 rows of 16 floats.
GB_INLINE void turn(const Floats* from, Floats* to) {
#ifdef GB_VNNI
    __m512 a[16], b[16];
    GB_UNROLL for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)from[i], (__m512)from[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)from[i], (__m512)from[i + 1]);
    }
    GB_UNROLL for (int i = 0; i < 16; i += 4)
        GB_UNROLL for (int j = 0; j < 2; j++) {
            __m512d low = (__m512d)a[i + j], high = (__m512d)a[i + j + 2];
            b[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
    GB_UNROLL for (int i = 0; i < 16; i += 8)
        GB_UNROLL for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0x88);
            a[i + j + 4] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0xdd);
        }
    GB_UNROLL for (int j = 0; j < 8; j++) {
        to[j] = (Floats)_mm512_shuffle_f32x4(a[j], a[j + 8], 0x88);
        to[j + 8] = (Floats)_mm512_shuffle_f32x4(a[j], a[j + 8], 0xdd);
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j][i] = from[i][j];
#endif
}

// Rows of 16 channels, of which `n` count, to a result whose positions are adjacent: turned by blocks of 16 by 16.
static void put_turned(const ProductArgs* p, const Floats* y, int rows, const Where* where, int64_t to, int n, int how) {
    for (int first = 0; first < rows;) {
        int run = 1;
        while (run < 16 && first + run < rows && where[first + run].to == where[first].to + run) run++;
        Floats turned[16];
        turn(y + first, turned);
        for (int j = 0; j < n; j++) put_floats(p, where[first].to + to + j * p->r_channel, 1, turned[j], run, how);
        first += run;
    }
}

GB_INLINE void put_whole(float* at, Floats y, bool past) {
#ifdef GB_VNNI
    if (past) {
        _mm512_stream_ps(at, (__m512)y);
        return;
    }
#endif
    (void)past;
    __builtin_memcpy(at, &y, sizeof y);
}

GB_INLINE void put_whole(uint16_t* at, Floats y, bool) {
    const Halves half = to_bf16(y);
    __builtin_memcpy(at, &half, sizeof half);
}

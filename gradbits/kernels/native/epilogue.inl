// Exact sums to floats: fl(sum) * scale + terms, one rounding per operation, then the activation and the cast, then to
// where they belong.

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

// Up to 16 channels of an operand.
GB_INLINE Floats operand_at(const Operand* o, int64_t group, const Where* w, int64_t channel, int n) {
    const float* from = o->values + group * o->group + w->sample * o->sample + w->position * o->position;
    Floats v;
    if (o->channel == 0) return *from - (Floats){};
    from += channel * o->channel;
    if (n == 16 && o->channel == 1) {
        __builtin_memcpy(&v, from, sizeof v);
        return v;
    }
    float some[16] = {0};
    for (int i = 0; i < n; i++) some[i] = from[i * o->channel];
    __builtin_memcpy(&v, some, sizeof v);
    return v;
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

GB_INLINE Floats choose(Words mask, Floats yes, Floats no) {
    return (Floats)((mask & (Words)yes) | (~mask & (Words)no));
}

// One half plus GELU's curve, every operation rounded once in the order that gelu.py gives.
GB_INLINE Floats share_of(Floats x, const float* top, float end) {
    const float* bottom = top + GB_GELU_TOP;
    const Floats none = {}, low = none - end, high = none + end;
    Floats v = choose(x < low, low, x);  // NaN stays
    v = choose(v > high, high, v);
    Floats t = v * v, a = none + top[GB_GELU_TOP - 1], b = none + bottom[GB_GELU_BOTTOM - 1];
    GB_UNROLL for (int k = GB_GELU_TOP - 2; k >= 0; k--) a = a * t + top[k];
    GB_UNROLL for (int k = GB_GELU_BOTTOM - 2; k >= 0; k--) b = b * t + bottom[k];
    Floats c = v * a / b;
    c = choose(x <= low, none - 0.5f, c);
    c = choose(x >= high, none + 0.5f, c);
    return 0.5f + c;
}

GB_INLINE Floats activated(const Epilogue* e, Floats y) {
    if (e->activation == GB_NO_ACTIVATION) return y;
    if (e->activation == GB_RELU) return choose(y <= (Floats){}, (Floats){}, y);
    return y * share_of(y, e->curve, e->end);
}

GB_INLINE Floats finished(const ProductArgs* p, Floats y, Floats scale, const Floats* term) {
    y *= scale;
    for (int t = 0; t < p->epilogue.count; t++) y += term[t];
    return activated(&p->epilogue, y);
}

// Up to 16 channels of scale and terms.
GB_INLINE void load_operands(const Epilogue* e, int64_t group, const Where* w, int64_t channel, int n, Floats* scale,
                             Floats* term) {
    *scale = operand_at(&e->scale, group, w, channel, n);
    for (int t = 0; t < e->count; t++) term[t] = operand_at(&e->terms[t], group, w, channel, n);
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

// V whole vectors of channels of every row, which take the same scale and terms, to adjacent results of type R.
template <class R, class S, int V>
static void finish_whole(const ProductArgs* p, const S* sums, int64_t pitch, int rows, const Where* where, int64_t group,
                         int64_t channel, int how) {
    const int count = p->epilogue.count;
    Floats scale[V], term[V][GB_TERMS];
    for (int v = 0; v < V; v++) load_operands(&p->epilogue, group, where, channel + v * 16, 16, &scale[v], term[v]);
    for (int m = 0; m < rows; m++, sums += pitch) {
        R* at = (R*)p->result + where[m].to + channel;
        const bool past = (how & STREAM) && ((uintptr_t)at & 63) == 0;
        Floats y[V];
        GB_UNROLL for (int v = 0; v < V; v++) y[v] = floats_of(sums + v * 16) * scale[v];
        for (int t = 0; t < count; t++)
            GB_UNROLL for (int v = 0; v < V; v++) y[v] += term[v][t];
        if (p->epilogue.activation)
            for (int v = 0; v < V; v++) y[v] = activated(&p->epilogue, y[v]);
        GB_UNROLL for (int v = 0; v < V; v++) put_whole(at + v * 16, y[v], past);
    }
}

// As many channels as fill vectors, from the first on; returns how many.
template <class R, class S>
static int64_t finish_vectors(const ProductArgs* p, const S* sums, int64_t pitch, int rows, int64_t width,
                              const Where* where, int64_t group, int64_t channel, int how) {
    int64_t at = 0;
    for (; at + 64 <= width; at += 64) finish_whole<R, S, 4>(p, sums + at, pitch, rows, where, group, channel + at, how);
    for (; at + 16 <= width; at += 16) finish_whole<R, S, 1>(p, sums + at, pitch, rows, where, group, channel + at, how);
    return at;
}

// To a result whose channels are adjacent: row by row, so that memory is written in its order.
template <class S>
static void finish_rows(const ProductArgs* p, const S* sums, int64_t pitch, int rows, int64_t width, const Where* where,
                        int64_t group, int64_t channel, int how) {
    int64_t at = 0;
    if ((how & UNIFORM) && p->r_channel == 1) {
        if (p->epilogue.dtype == GB_FLOAT32)
            at = finish_vectors<float>(p, sums, pitch, rows, width, where, group, channel, how);
        else
            at = finish_vectors<uint16_t>(p, sums, pitch, rows, width, where, group, channel, how);
    }
    for (; at < width; at += 16) {
        const int n = (int)least(width - at, 16);
        Floats scale, term[GB_TERMS];
        for (int m = 0; m < rows; m++) {
            if (!m || !(how & UNIFORM)) load_operands(&p->epilogue, group, where + m, channel + at, n, &scale, term);
            Floats y = finished(p, floats_of(sums + m * pitch + at), scale, term);
            put_floats(p, where[m].to + (channel + at) * p->r_channel, p->r_channel, y, n, how);
        }
    }
}

// Finish `rows` rows of `width` adjacent channels from `channel` on; S is int32_t or int64_t. Sums are read by 16.
template <class S>
static void finish(const ProductArgs* p, const S* sums, int64_t pitch, int rows, int64_t width, const Where* where,
                   int64_t group, int64_t channel, int how) {
    if (p->r_channel == 1 || rows == 1) {
        finish_rows(p, sums, pitch, rows, width, where, group, channel, how);
        return;
    }
    for (int64_t v = 0; v < width; v += 16) {
        const int n = (int)(width - v < 16 ? width - v : 16);
        Floats kept[MOST_ROWS + 16], term[GB_TERMS], scale;
        for (int m = 0; m < rows; m++) {
            if (!m || !(how & UNIFORM))
                load_operands(&p->epilogue, group, where + m, channel + v, n, &scale, term);
            kept[m] = finished(p, floats_of(sums + m * pitch + v), scale, term);
        }
        put_turned(p, kept, rows, where, (channel + v) * p->r_channel, n, how);
    }
}

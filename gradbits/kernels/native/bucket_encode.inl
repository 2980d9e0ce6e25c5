// Values to packed symbols, as gradbits/kernels/buckets.py defines them.

static const int MAX_LEVELS = 256;
static const int FEW_LEVELS = 16;  // as many as one AVX-512 register holds

struct Grid {
    float levels[MAX_LEVELS], per_gap[MAX_LEVELS];
    float above[MAX_LEVELS];  // the level after this one; NaN, which is above none, where a value is held against none
    int count, first;  // `first`: the power of two that a search begins with
    int64_t ahead;     // values from here to those that are read next from memory; 0 where these are near
    bool uniform;  // equally spaced, but for rounding
    float half;    // gaps from 0 to 1
};

static void grid_of(Grid* g, const float* levels, int count) {
    const float none = __builtin_nanf("");
    g->count = count;
    g->half = (float)(count - 1) / 2.0f;
    g->uniform = true;
    g->first = MAX_LEVELS / 2;
    while (g->first > count - 2) g->first /= 2;
    for (int i = 0; i < MAX_LEVELS; i++) {
        g->levels[i] = i < count ? levels[i] : none;
        g->per_gap[i] = i + 1 < count ? 1.0f / (levels[i + 1] - levels[i]) : 0.0f;
        g->above[i] = i + 2 < count ? levels[i + 1] : none;
        float ideal = (float)i / g->half - 1.0f;
        if (i < count && __builtin_fabsf(levels[i] - ideal) * g->half > 0x1p-20f * (float)(count + 8)) g->uniform = false;
    }
}

// u = v + 1/2 of the noise bits k, exact: 1 + u has the bits below.
GB_INLINE float unit_noise(HalfWord bits) { return as_float(((uint32_t)(uint16_t)bits << 7) ^ 0x3fc00040u) - 1.0f; }

template <int MODE>
GB_INLINE float unit_of(const HalfWord* bits, const float* noise, int i) {
    return MODE == GB_KEYED ? unit_noise(bits[i]) : noise[i] + 0.5f;
}

// Symbols of n values of one bucket; `scale` is the reciprocal of its norm.
template <int MODE>
static void symbols_plain(const float* x, uint8_t* to, int n, float scale, const Grid* g, const HalfWord* bits,
                          const float* noise) {
    const int HELD = 64;
    for (int at = 0; at < n; at += HELD) {
        int held = n - at < HELD ? n - at : HELD;
        float r[HELD];
        int32_t below[HELD];
        for (int i = 0; i < held; i++) {
            float t = x[at + i] * scale;
            t = t > -1.0f ? t : -1.0f;
            r[i] = t < 1.0f ? t : 1.0f;
            below[i] = 0;
        }
        if (g->count <= 2 * FEW_LEVELS) {
            for (int level = 1; level < g->count - 1; level++)
                for (int i = 0; i < held; i++) below[i] += g->levels[level] <= r[i];
        } else {
            for (int i = 0; i < held; i++)
                for (int step = MAX_LEVELS / 2; step; step /= 2) {
                    int next = below[i] + step;
                    below[i] = next < g->count - 1 && g->levels[next] <= r[i] ? next : below[i];
                }
        }
        for (int i = 0; i < held; i++) {
            float p = (r[i] - g->levels[below[i]]) * g->per_gap[below[i]];
            to[at + i] = (uint8_t)(below[i] + (unit_of<MODE>(bits, noise, at + i) < p));
        }
    }
}

#if GB_VNNI
struct Wide {
    __m512 levels, per_gap, above;
};

template <bool FEW>
GB_INLINE __m512 look_up(__m512 few, const float* all, __m512i index) {
    return FEW ? _mm512_permutexvar_ps(index, few) : _mm512_i32gather_ps(index, all, 4);
}

// The last level but one that is not above r.
template <bool FEW>
GB_INLINE __m512i place_of(__m512 r, const Grid* g, const Wide* w) {
    __mmask16 up = g->first ? _mm512_cmp_ps_mask(_mm512_set1_ps(g->levels[g->first]), r, _CMP_LE_OQ) : (__mmask16)0;
    __m512i place = _mm512_maskz_set1_epi32(up, g->first);
    GB_UNROLL
    for (int step = FEW ? FEW_LEVELS / 4 : MAX_LEVELS / 4; step; step /= 2) {
        if (step >= g->first) continue;
        // `above` of the place before is the level of the place
        __m512i next = _mm512_add_epi32(place, _mm512_set1_epi32(step - 1));
        up = _mm512_cmp_ps_mask(look_up<FEW>(w->above, g->above, next), r, _CMP_LE_OQ);
        place = _mm512_mask_add_epi32(place, up, next, _mm512_set1_epi32(1));
    }
    return place;
}

template <bool FEW>
GB_INLINE __m512i symbols_of(__m512 x, __m512 u, __m512 scale, const Grid* g, const Wide* w) {
    __m512 r = _mm512_mul_ps(x, scale);
    __m512i place = place_of<FEW>(r, g, w);
    __m512 p = _mm512_sub_ps(r, look_up<FEW>(w->levels, g->levels, place));
    p = _mm512_mul_ps(p, look_up<FEW>(w->per_gap, g->per_gap, place));
    return _mm512_mask_add_epi32(place, _mm512_cmp_ps_mask(u, p, _CMP_LT_OQ), place, _mm512_set1_epi32(1));
}

template <int MODE>
GB_INLINE __m512 units_of(const HalfWord* bits, const float* noise, int at) {
    if (MODE == GB_EXPLICIT) return _mm512_add_ps(_mm512_loadu_ps(noise + at), _mm512_set1_ps(0.5f));
    __m512i k = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(bits + at)));
    __m512i pattern = _mm512_xor_si512(_mm512_slli_epi32(k, 7), _mm512_set1_epi32(0x3fc00040));
    return _mm512_sub_ps(_mm512_castsi512_ps(pattern), _mm512_set1_ps(1.0f));
}

template <int MODE, bool FEW, bool UNIFORM>
static void symbols_wide(const float* x, uint8_t* to, int n, float scale, const Grid* g, const HalfWord* bits,
                         const float* noise) {
    const __m512 each = _mm512_set1_ps(scale);
    const Wide w = {_mm512_loadu_ps(g->levels), _mm512_loadu_ps(g->per_gap), _mm512_loadu_ps(g->above)};
    // Between uniform levels the symbol is the whole part of (r + 1) * half + 1 - u, unless that is about whole.
    const float about = 0x1p-18f * (float)(g->count < 16 ? 16 : g->count);
    const __m512 gaps = _mm512_set1_ps(scale * g->half);
    const __m512 low = _mm512_set1_ps(g->half + 1.0f - about), high = _mm512_set1_ps(g->half + 1.0f + about);
    const __m512i most = _mm512_set1_epi32(g->count - 1);
    const uintptr_t ahead = (uintptr_t)(4 * g->ahead);
    int at = 0;
    for (; at + 16 <= n; at += 16) {
        __m512 v = _mm512_loadu_ps(x + at), u = units_of<MODE>(bits, noise, at);
        if (ahead) _mm_prefetch((const char*)((uintptr_t)(x + at) + ahead), _MM_HINT_T0);
        __m512i found;
        if (UNIFORM) {
            found = _mm512_cvttps_epi32(_mm512_fmadd_ps(v, gaps, _mm512_sub_ps(low, u)));
            __m512i other = _mm512_cvttps_epi32(_mm512_fmadd_ps(v, gaps, _mm512_sub_ps(high, u)));
            __mmask16 unsure = _mm512_cmpneq_epi32_mask(found, other), over = _mm512_cmpgt_epu32_mask(other, most);
            if (__builtin_expect(!_mm512_kortestz(unsure, over), 0)) found = symbols_of<FEW>(v, u, each, g, &w);
        } else {
            found = symbols_of<FEW>(v, u, each, g, &w);
        }
        _mm_storeu_si128((__m128i*)(to + at), _mm512_cvtepi32_epi8(found));
    }
    if (at < n) symbols_plain<MODE>(x + at, to + at, n - at, scale, g, bits + at, noise + at);
}
#endif

typedef void (*Symbols)(const float*, uint8_t*, int, float, const Grid*, const HalfWord*, const float*);

template <int MODE>
static Symbols symbols_for(const Grid* g) {
#if GB_VNNI
    if (g->count <= FEW_LEVELS) return g->uniform ? symbols_wide<MODE, true, true> : symbols_wide<MODE, true, false>;
    return g->uniform ? symbols_wide<MODE, false, true> : symbols_wide<MODE, false, false>;
#else
    return symbols_plain<MODE>;
#endif
}

struct EncodeBucketsJob {
    const BucketArgs* b;
    const Grid* grid;
    Symbols symbols;
    Repack pack;
    int64_t whole;       // elements of whole buckets that are coded together, a multiple of 64
    int64_t task, next;  // `task`: elements that one thread takes at once, a multiple of that
};

// Elements first .. last - 1, `first` a multiple of 8; only elements of the last block of all may end inside a byte.
static void encode_span(const EncodeBucketsJob* job, int64_t first, int64_t last) {
    const BucketArgs* b = job->b;
    uint32_t words[WIRE_BLOCK / 2 + 1];
    uint8_t symbols[WIRE_BLOCK];
    for (int64_t at = first; at < last; at += WIRE_BLOCK) {
        int n = (int)(last - at < WIRE_BLOCK ? last - at : WIRE_BLOCK);
        const bool keyed = b->mode == GB_KEYED;
        const HalfWord* bits = keyed ? noise_bits(words, at, n, b->k0, b->k1) : nullptr;
        for (int done = 0; done < n;) {
            int64_t index = (at + done) / b->bucket, end = (index + 1) * b->bucket - at;
            int stop = (int)(end < n ? end : n);
            float norm = b->norms[index];
            if (norm > 0.0f) {
                float scale = 1.0f / (norm > NORM_TINY ? norm : NORM_TINY);
                job->symbols(b->x + at + done, symbols + done, stop - done, scale, job->grid,
                             keyed ? bits + done : nullptr, keyed ? nullptr : b->noise + at + done);
            } else {
                __builtin_memset(symbols + done, job->grid->count / 2, (size_t)(stop - done));
            }
            done = stop;
        }
        job->pack(symbols, b->packed + at / 8 * b->bits, n);
    }
}

static void encode_buckets_body(void* data) {
    EncodeBucketsJob* job = (EncodeBucketsJob*)data;
    const BucketArgs* b = job->b;
    for (int64_t first; (first = gb_take(&job->next) * job->task) < b->count;) {
        int64_t last = first + job->task < b->count ? first + job->task : b->count;
        if (b->order == GB_GIVEN) {
            encode_span(job, first, last);
            continue;
        }
        // norms and then their buckets, while these are in the cache
        for (int64_t at = first; at < last; at += job->whole) {
            int64_t end = at + job->whole < last ? at + job->whole : last;
            for (int64_t i = at / b->bucket; i * b->bucket < end; i++) {
                int64_t start = i * b->bucket, left = b->count - start;
                b->norms[i] = norm_of(b->x + start, left < b->bucket ? left : b->bucket, b->order);
            }
            encode_span(job, at, end);
        }
    }
}

// With an order other than GB_GIVEN the norms are written first, bucket by bucket where they are short.
static int encode_buckets(const BucketArgs* args) {
    BucketArgs b = *args;
    Grid grid;
    grid_of(&grid, b.levels, b.level_count);
    Symbols symbols = b.mode == GB_KEYED ? symbols_for<GB_KEYED>(&grid) : symbols_for<GB_EXPLICIT>(&grid);
    int64_t task = WIRE_TASK, whole = b.bucket;
    if (b.order != GB_GIVEN) {
        while (whole % 64 || whole < WIRE_BLOCK) whole *= 2;
        if (whole > 4 * WIRE_TASK) {
            bucket_norms(&b);
            b.order = GB_GIVEN;
        } else {
            task = whole < WIRE_TASK ? WIRE_TASK / whole * whole : whole;
        }
    }
    grid.ahead = b.order == GB_GIVEN || whole <= 2 * WIRE_BLOCK ? 0 : whole;
    EncodeBucketsJob job = {&b, &grid, symbols, packer(b.bits), whole, task, 0};
    gb_parallel(b.count > task ? b.threads : 1, encode_buckets_body, &job);
    return GB_OK;
}

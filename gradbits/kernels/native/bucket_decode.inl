// Packed symbols to values, or values that are added to others, as gradbits/kernels/buckets.py defines them.

// n values of one bucket from symbols of one byte each.
template <bool ADD>
static void values_plain(const uint8_t* symbols, float* out, int n, const float* levels, float norm) {
    for (int i = 0; i < n; i++) {
        float value = levels[symbols[i]] * norm;
        out[i] = ADD ? out[i] + value : value;
    }
}

#if GB_VNNI
// n values, a multiple of 16, of one bucket from symbols of up to four bits; returns the largest symbol seen.
template <bool ADD, int BITS>
static void values_wide(const uint8_t* packed, float* out, int n, const float* levels, float norm, __m512i* largest) {
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(norm));
    const __m512i lane = _mm512_set_epi32(7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i shift = _mm512_mullo_epi32(lane, _mm512_set1_epi32(BITS)), mask = _mm512_set1_epi32((1 << BITS) - 1);
    __m512i seen = *largest;
    for (int at = 0; at < n; at += 16) {
        uint64_t word = 0;
        __builtin_memcpy(&word, packed + at / 8 * BITS, BITS != 3 || n - at > 16 ? (BITS == 3 ? 8 : 2 * BITS) : 6);
        // eight symbols begin in the lower lanes, eight in the upper
        __m512i index = _mm512_set1_epi32((int)(uint32_t)word);
        index = _mm512_mask_set1_epi32(index, 0xff00, (int)(uint32_t)(word >> (8 * BITS)));
        index = _mm512_and_si512(_mm512_srlv_epi32(index, shift), mask);
        seen = _mm512_max_epu32(seen, index);
        __m512 value = _mm512_permutexvar_ps(index, table);
        _mm512_storeu_ps(out + at, ADD ? _mm512_add_ps(_mm512_loadu_ps(out + at), value) : value);
    }
    *largest = seen;
}

typedef void (*Values)(const uint8_t*, float*, int, const float*, float, __m512i*);

template <bool ADD>
GB_INLINE Values values_for(int bits) {
    const Values table[] = {values_wide<ADD, 1>, values_wide<ADD, 2>, values_wide<ADD, 3>, values_wide<ADD, 4>};
    return table[bits - 1];
}
#endif

struct DecodeBucketsJob {
    const BucketArgs* b;
    const float* levels;  // 256 of them
    int64_t next;
    int32_t bad;
};

template <bool ADD>
static bool decode_span_plain(const DecodeBucketsJob* job, int64_t first, int64_t last, Repack unpack) {
    const BucketArgs* b = job->b;
    uint8_t symbols[WIRE_BLOCK], largest = 0;
    for (int64_t at = first; at < last; at += WIRE_BLOCK) {
        int n = (int)(last - at < WIRE_BLOCK ? last - at : WIRE_BLOCK);
        unpack(b->packed + at / 8 * b->bits, symbols, n);
        for (int i = 0; i < n; i++) largest = symbols[i] > largest ? symbols[i] : largest;
        for (int done = 0; done < n;) {
            int64_t index = (at + done) / b->bucket, end = (index + 1) * b->bucket - at;
            int stop = (int)(end < n ? end : n);
            values_plain<ADD>(symbols + done, b->out + at + done, stop - done, job->levels, b->norms[index]);
            done = stop;
        }
    }
    return largest < b->level_count;
}

#if GB_VNNI
// Whole groups of 16 symbols that no bucket ends in; what is left goes the plain way.
template <bool ADD>
static bool decode_span_wide(const DecodeBucketsJob* job, int64_t first, int64_t last, Repack unpack) {
    const BucketArgs* b = job->b;
    const Values values = values_for<ADD>(b->bits);
    __m512i largest = _mm512_setzero_si512();
    int64_t whole = first + (last - first) / 16 * 16;
    for (int64_t at = first; at < whole;) {
        int64_t index = at / b->bucket, end = (index + 1) * b->bucket;
        int64_t stop = end < whole ? end : whole;
        values(b->packed + at / 8 * b->bits, b->out + at, (int)(stop - at), job->levels, b->norms[index], &largest);
        at = stop;
    }
    bool good = (int64_t)_mm512_reduce_max_epu32(largest) < b->level_count;
    return decode_span_plain<ADD>(job, whole, last, unpack) && good;
}
#endif

static void decode_buckets_body(void* data) {
    DecodeBucketsJob* job = (DecodeBucketsJob*)data;
    const BucketArgs* b = job->b;
    Repack unpack = unpacker(b->bits);
    bool (*span)(const DecodeBucketsJob*, int64_t, int64_t, Repack) =
        b->add ? decode_span_plain<true> : decode_span_plain<false>;
#if GB_VNNI
    if (b->bits <= 4 && b->bucket % 16 == 0) span = b->add ? decode_span_wide<true> : decode_span_wide<false>;
#endif
    for (int64_t first; (first = gb_take(&job->next) * WIRE_TASK) < b->count;) {
        int64_t last = first + WIRE_TASK < b->count ? first + WIRE_TASK : b->count;
        if (!span(job, first, last, unpack)) __atomic_store_n(&job->bad, 1, __ATOMIC_RELAXED);
    }
}

static int decode_buckets(const BucketArgs* b) {
    float levels[MAX_LEVELS] = {};
    for (int i = 0; i < b->level_count; i++) levels[i] = b->levels[i];
    DecodeBucketsJob job = {b, levels, 0, 0};
    gb_parallel(b->count > WIRE_TASK ? b->threads : 1, decode_buckets_body, &job);
    return job.bad ? GB_BAD_DATA : GB_OK;
}

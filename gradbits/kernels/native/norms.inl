// Norms of buckets, as gradbits/kernels/buckets.py defines them: the order of a sum is part of the definition.

static const int NORM_PIECE = 256, NORM_LANES = 16;
static const float NORM_TINY = 0x1p-126f, NORM_LARGEST = 0x1.fffffep127f;

GB_INLINE double halves(double* lanes) {
    for (int half = NORM_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// The sum of the squares of up to 256 values. A square is exact in float64, so a fused multiply-add changes nothing.
GB_INLINE double squares_of_piece(const float* x, int n) {
#if GB_VNNI
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int at = 0; at < n; at += NORM_LANES) {
        __mmask16 some = n - at < NORM_LANES ? (__mmask16)((1 << (n - at)) - 1) : (__mmask16)0xffff;
        __m512 both = _mm512_maskz_loadu_ps(some, x + at);
        __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(both)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(both, 1));
        low = _mm512_fmadd_pd(a, a, low);
        high = _mm512_fmadd_pd(b, b, high);
    }
    __m512d eight = _mm512_add_pd(low, high);
    __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
#else
    double lanes[NORM_LANES] = {};
    int at = 0;
    for (; at + NORM_LANES <= n; at += NORM_LANES)
        for (int i = 0; i < NORM_LANES; i++) lanes[i] += (double)x[at + i] * (double)x[at + i];
    for (int i = 0; at + i < n; i++) lanes[i] += (double)x[at + i] * (double)x[at + i];
    return halves(lanes);
#endif
}

GB_INLINE double sum_of_piece(const double* x, int n) {
    if (n <= 2) return n == 2 ? x[0] + x[1] : x[0];
    double lanes[NORM_LANES] = {};
    for (int at = 0; at < n; at += NORM_LANES)
        for (int i = 0; i < NORM_LANES && at + i < n; i++) lanes[i] += x[at + i];
    return halves(lanes);
}

// Sums of pieces wait here until 256 of them make a piece of the next level; 2^63 values have 8 levels.
struct Sums {
    double held[8][NORM_PIECE];
    int count[8];
};

static void add_piece(Sums* s, double sum) {
    for (int level = 0; level < 8; level++) {
        s->held[level][s->count[level]++] = sum;
        if (s->count[level] < NORM_PIECE) return;
        sum = sum_of_piece(s->held[level], NORM_PIECE);
        s->count[level] = 0;
    }
}

static double sum_of_squares(const float* x, int64_t n) {
    if (n <= NORM_PIECE) return squares_of_piece(x, (int)n);
    if (n <= NORM_PIECE * NORM_PIECE) {
        double held[NORM_PIECE];
        int count = 0;
        for (int64_t at = 0; at < n; at += NORM_PIECE)
            held[count++] = squares_of_piece(x + at, (int)(n - at < NORM_PIECE ? n - at : NORM_PIECE));
        return sum_of_piece(held, count);
    }
    Sums s;
    for (int level = 0; level < 8; level++) s.count[level] = 0;
    for (int64_t at = 0; at < n; at += NORM_PIECE)
        add_piece(&s, squares_of_piece(x + at, (int)(n - at < NORM_PIECE ? n - at : NORM_PIECE)));
    double sum = 0.0;  // of the levels below: what did not fill a piece there
    bool some = false;
    for (int level = 0; level < 8; level++) {
        if (some) s.held[level][s.count[level]++] = sum;
        if (!s.count[level]) continue;
        sum = sum_of_piece(s.held[level], s.count[level]);
        some = true;
    }
    return sum;
}

GB_INLINE float largest_magnitude(const float* x, int64_t n) {
    int32_t found = 0;  // as integers, magnitudes are in the order of the floats, and NaN is above all
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        found = bits > found ? bits : found;
    }
    float value;
    __builtin_memcpy(&value, &found, 4);
    return value;
}

// NaN and Inf stay, so that the caller sees that a value was not finite.
GB_INLINE float norm_of(const float* x, int64_t n, int order) {
    double norm = order == GB_L2 ? __builtin_sqrt(sum_of_squares(x, n)) : (double)largest_magnitude(x, n);
    if (!(norm <= 0x1p1000)) return (float)norm;
    if (norm < NORM_TINY) return 0.0f;
    return norm > NORM_LARGEST ? NORM_LARGEST : (float)norm;
}

struct NormsJob {
    const BucketArgs* b;
    int64_t task, next;  // `task`: buckets that one thread takes at once
};

static void norms_body(void* data) {
    NormsJob* job = (NormsJob*)data;
    const BucketArgs* b = job->b;
    int64_t buckets = (b->count + b->bucket - 1) / b->bucket;
    for (int64_t first; (first = gb_take(&job->next) * job->task) < buckets;)
        for (int64_t i = first; i < buckets && i < first + job->task; i++) {
            int64_t at = i * b->bucket, left = b->count - at;
            b->norms[i] = norm_of(b->x + at, left < b->bucket ? left : b->bucket, b->order);
        }
}

static int bucket_norms(const BucketArgs* b) {
    NormsJob job = {b, (WIRE_TASK + b->bucket - 1) / b->bucket, 0};
    gb_parallel(b->count > WIRE_TASK ? b->threads : 1, norms_body, &job);
    return GB_OK;
}

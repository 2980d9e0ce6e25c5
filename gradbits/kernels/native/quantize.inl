// Values to codes and values to ranges, in one pass over memory. Compiled once per instruction set.

// elements that pass through the buffers at once; elements that one thread takes
static const int BLOCK = 1024;
static const int64_t TASK = 1 << 15;

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };

GB_INLINE float widen(float x) { return x; }
GB_INLINE float widen(Bf16 x) { return as_float((uint32_t)x.bits << 16); }
GB_INLINE float widen(Fp16 x) {
    uint32_t magnitude = x.bits & 0x7fffu, sign = (uint32_t)(x.bits & 0x8000u) << 16;
    // normal: move the exponent; below: the bits are an integer times 2^-24; NaN and Inf: keep the largest exponent
    uint32_t normal = (magnitude << 13) + 0x38000000u;
    float tiny = (float)(int32_t)magnitude * 0x1p-24f;
    uint32_t small;
    __builtin_memcpy(&small, &tiny, 4);
    uint32_t bits = magnitude < 0x400u ? small : normal;
    bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
    return as_float(bits | sign);
}

template <class T, int MODE, bool VARIES, bool SHIFT, bool ZERO>
GB_INLINE void codes_of(const T* x, int8_t* codes, int n, const float* r, const float* a, const float* z, float low,
                        float high, const HalfWord* bits, const float* noise) {
    float r0 = r[0], a0 = SHIFT ? a[0] : 0.0f, z0 = ZERO ? z[0] : 0.0f;
    for (int i = 0; i < n; i++) {
        float t = widen(x[i]);
        if (SHIFT) t -= VARIES ? a[i] : a0;
        t *= VARIES ? r[i] : r0;
        if (MODE == GB_KEYED) t += ((float)bits[i] + 0.5f) * 0x1p-16f;
        if (MODE == GB_EXPLICIT) t += noise[i];
        t = __builtin_rintf(t);
        if (ZERO) t += VARIES ? z[i] : z0;
        t = t > low ? t : low;  // NaN becomes low: converting it to an integer would be undefined
        t = t < high ? t : high;
        codes[i] = (int8_t)(int32_t)t;
    }
}

// Write parameter p of elements first .. first + n - 1 of [*, count, inner] one by one.
static void spread(float* to, const float* p, int64_t first, int n, int64_t count, int64_t inner) {
    int64_t c = first / inner % count, inside = first % inner;
    for (int i = 0; i < n;) {
        if (inner == 1) {
            int run = (int)(count - c < n - i ? count - c : n - i);
            for (int j = 0; j < run; j++) to[i + j] = p[c + j];
            i += run;
            c = 0;
        } else {
            int run = (int)(inner - inside < n - i ? inner - inside : n - i);
            for (int j = 0; j < run; j++) to[i + j] = p[c];
            i += run;
            inside = 0;
            c = c + 1 == count ? 0 : c + 1;
        }
    }
}

template <class T, int MODE, bool SHIFT, bool ZERO>
static void quantize_span(const QuantizeArgs* q, int64_t first, int64_t last) {
    uint32_t words[BLOCK / 2 + 1];
    float r[BLOCK], a[BLOCK], z[BLOCK];
    const bool varies = q->count > 1, dense = varies && q->inner < 64;
    for (int64_t at = first; at < last;) {
        int64_t left = last - at;
        if (varies && !dense && q->inner - at % q->inner < left) left = q->inner - at % q->inner;
        int n = (int)(left < BLOCK ? left : BLOCK);
        const HalfWord* bits = MODE == GB_KEYED ? noise_bits(words, at, n, q->k0, q->k1) : nullptr;
        const float* noise = MODE == GB_EXPLICIT ? q->noise + at : nullptr;
        const T* x = (const T*)q->x + at;
        if (dense) {
            spread(r, q->r, at, n, q->count, q->inner);
            if (SHIFT) spread(a, q->a, at, n, q->count, q->inner);
            if (ZERO) spread(z, q->z, at, n, q->count, q->inner);
            codes_of<T, MODE, true, SHIFT, ZERO>(x, q->codes + at, n, r, a, z, q->low, q->high, bits, noise);
        } else {
            int64_t c = varies ? at / q->inner % q->count : 0;
            const float *ac = SHIFT ? q->a + c : nullptr, *zc = ZERO ? q->z + c : nullptr;
            codes_of<T, MODE, false, SHIFT, ZERO>(x, q->codes + at, n, q->r + c, ac, zc, q->low, q->high, bits, noise);
        }
        at += n;
    }
}

typedef void (*Span)(const QuantizeArgs*, int64_t, int64_t);

template <class T, int MODE>
static Span span_for_parameters(const QuantizeArgs* q) {
    if (q->a) return q->z ? quantize_span<T, MODE, true, true> : quantize_span<T, MODE, true, false>;
    return q->z ? quantize_span<T, MODE, false, true> : quantize_span<T, MODE, false, false>;
}

template <class T>
static Span span_for(const QuantizeArgs* q) {
    if (q->mode == GB_KEYED) return span_for_parameters<T, GB_KEYED>(q);
    return q->mode == GB_EXPLICIT ? span_for_parameters<T, GB_EXPLICIT>(q) : span_for_parameters<T, GB_NEAREST>(q);
}

struct QuantizeJob {
    const QuantizeArgs* q;
    Span span;
    int64_t total, next;
};

static void quantize_body(void* data) {
    QuantizeJob* job = (QuantizeJob*)data;
    const int64_t tasks = (job->total + TASK - 1) / TASK;
    for (int64_t task; (task = gb_take_back(&job->next, tasks)) >= 0;) {
        int64_t first = task * TASK, last = first + TASK < job->total ? first + TASK : job->total;
        job->span(job->q, first, last);
    }
}

static int quantize(const QuantizeArgs* q) {
    Span span = q->dtype == GB_FLOAT32    ? span_for<float>(q)
                : q->dtype == GB_BFLOAT16 ? span_for<Bf16>(q)
                                          : span_for<Fp16>(q);
    QuantizeJob job = {q, span, q->outer * q->count * q->inner, 0};
    gb_parallel(job.total > TASK ? q->threads : 1, quantize_body, &job);
    return GB_OK;
}

// Batch norm with the shortcut and the ReLU behind it, values [rows, lanes] with channels last; few channels are
// repeated until they fill `lanes`, and the last row may be shorter. Compiled once per instruction set.

#if defined(__clang__)
#define GB_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GB_INDEPENDENT _Pragma("GCC ivdep")
#endif

GB_INLINE void narrow(float value, float* to) { *to = value; }
GB_INLINE void narrow(float value, Bf16* to) { to->bits = to_bf16(value); }

struct NormJob {
    const NormArgs* p;
    int64_t tasks, next;
    float *sums, *scale, *shift, *offset, *slope;  // [tasks, 2, lanes]; [lanes] each
    bool stream;
};

GB_INLINE int64_t rows_of(const NormArgs* p) { return (p->total + p->lanes - 1) / p->lanes; }

enum { NORM_BLOCK = 64 };             // lanes whose sums stay in registers
enum { NORM_LARGE = 1 << 21 };  // values that are not in the caches any more when they are wanted next

template <class T, bool BACK>
GB_INLINE void norm_sums_block(const NormArgs* p, int64_t begin, int64_t end, int64_t at, const float* shift,
                               float* first, float* second) {
    float a[NORM_BLOCK], b[NORM_BLOCK], s[NORM_BLOCK];
    for (int j = 0; j < NORM_BLOCK; j++) a[j] = b[j] = 0.0f, s[j] = shift[j];
    for (int64_t row = begin; row < end; row++) {
        const int64_t start = row * p->lanes + at;
        const T* __restrict x = (const T*)p->x + start;
        const T* __restrict g = BACK ? (const T*)p->g + start : nullptr;
        const uint8_t* __restrict mask = BACK ? p->mask + start : nullptr;
        for (int j = 0; j < NORM_BLOCK; j++) {
            float v = widen(x[j]) - s[j];
            float w = BACK ? (mask[j] ? widen(g[j]) : 0.0f) : v;
            a[j] += w;
            b[j] += w * v;
        }
    }
    for (int j = 0; j < NORM_BLOCK; j++) first[j] = a[j], second[j] = b[j];
}

// Forward: sums of x - shift and of its square. Backward: sums of g and of g (x - shift), g where the mask lets it.
template <class T, bool BACK>
static void norm_sums_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float* __restrict shift = job->shift;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        float* __restrict first = job->sums + task * 2 * lanes;
        float* __restrict second = first + lanes;
        for (int64_t j = 0; j < lanes; j++) first[j] = second[j] = 0.0f;
        const int64_t begin = task * p->size, end = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        const int64_t whole = end * lanes <= p->total ? end : end - 1;  // rows that are not cut off
        int64_t done = 0;
        for (; done + NORM_BLOCK <= lanes; done += NORM_BLOCK)
            norm_sums_block<T, BACK>(p, begin, whole, done, shift + done, first + done, second + done);
        for (int64_t row = begin; row < end; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T* __restrict x = (const T*)p->x + start;
            const T* __restrict g = BACK ? (const T*)p->g + start : nullptr;
            const uint8_t* __restrict mask = BACK ? p->mask + start : nullptr;
            GB_INDEPENDENT
            for (int64_t j = row < whole ? done : 0; j < n; j++) {
                float v = widen(x[j]) - shift[j];
                float w = BACK ? (mask[j] ? widen(g[j]) : 0.0f) : v;
                first[j] += w;
                second[j] += w * v;
            }
        }
    }
}

// Results of NORM_BLOCK lanes to memory past the caches, where they are too large to be found there again.
template <class T>
GB_INLINE void stream(T* to, const T* from) {
#ifdef GB_VNNI
    for (size_t at = 0; at < NORM_BLOCK * sizeof(T); at += 64)
        _mm512_stream_si512((__m512i*)((char*)to + at), _mm512_load_si512((const char*)from + at));
#else
    __builtin_memcpy(to, from, NORM_BLOCK * sizeof(T));
#endif
}

GB_INLINE bool streams(const NormArgs* p) {
    uintptr_t start = (uintptr_t)p->y | (uintptr_t)p->rest | (uintptr_t)(p->backward ? nullptr : p->mask);
    return p->total > NORM_LARGE && p->total % p->lanes == 0 && p->lanes % NORM_BLOCK == 0 && (start & 63) == 0;
}

// y = x scale + shift (+ other), and what is left of it behind a ReLU.
template <class T, bool OTHER>
GB_INLINE void norm_forward_lanes(const T* __restrict x, const T* __restrict other, const float* __restrict scale,
                                  const float* __restrict shift, int64_t n, T* __restrict y, uint8_t* __restrict mask) {
    GB_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        float v = widen(x[j]) * scale[j] + shift[j];
        if (OTHER) v += widen(other[j]);
        mask[j] = !(v <= 0.0f);
        narrow(v > 0.0f || v != v ? v : 0.0f, y + j);
    }
}

template <class T, bool OTHER>
static void norm_forward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float *__restrict scale = job->scale, *__restrict shift = job->shift;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T* __restrict x = (const T*)p->x + start;
            const T* __restrict other = OTHER ? (const T*)p->other + start : nullptr;
            if (!job->stream) {
                norm_forward_lanes<T, OTHER>(x, other, scale, shift, n, (T*)p->y + start, p->mask + start);
                continue;
            }
            for (int64_t j = 0; j < n; j += NORM_BLOCK) {
                alignas(64) T y[NORM_BLOCK];
                alignas(64) uint8_t mask[NORM_BLOCK];
                norm_forward_lanes<T, OTHER>(x + j, OTHER ? other + j : nullptr, scale + j, shift + j, NORM_BLOCK, y, mask);
                stream((T*)p->y + start + j, y);
                stream(p->mask + start + j, mask);
            }
        }
    }
    flush();
}

// Gradients: of x, (g - offset - (x - shift) slope) scale, and of the shortcut, g where the mask lets it.
template <class T, bool OTHER>
GB_INLINE void norm_backward_lanes(const T* __restrict x, const T* __restrict g, const uint8_t* __restrict mask,
                                   const NormJob* job, int64_t at, int64_t n, T* __restrict y, T* __restrict rest) {
    const float *__restrict scale = job->scale + at, *__restrict shift = job->shift + at;
    const float *__restrict offset = job->offset + at, *__restrict slope = job->slope + at;
    GB_INDEPENDENT
    for (int64_t j = 0; j < n; j++) {
        float w = mask[j] ? widen(g[j]) : 0.0f;
        if (OTHER) narrow(w, rest + j);
        narrow((w - offset[j] - (widen(x[j]) - shift[j]) * slope[j]) * scale[j], y + j);
    }
}

template <class T, bool OTHER>
static void norm_backward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T *__restrict x = (const T*)p->x + start, *__restrict g = (const T*)p->g + start;
            const uint8_t* __restrict mask = p->mask + start;
            T* rest = OTHER ? (T*)p->rest + start : nullptr;
            if (!job->stream) {
                norm_backward_lanes<T, OTHER>(x, g, mask, job, 0, n, (T*)p->y + start, rest);
                continue;
            }
            for (int64_t j = 0; j < n; j += NORM_BLOCK) {
                alignas(64) T y[NORM_BLOCK], left[NORM_BLOCK];
                norm_backward_lanes<T, OTHER>(x + j, g + j, mask + j, job, j, NORM_BLOCK, y, left);
                stream((T*)p->y + start + j, y);
                if (OTHER) stream(rest + j, left);
            }
        }
    }
    flush();
}

static void norm_pass(NormJob* job, void (*body)(void*)) {
    job->next = 0;
    gb_parallel(job->p->total > TASK && job->tasks > 1 ? job->p->threads : 1, body, job);
}

// Write what the tasks have summed to `totals`, in float64.
static void norm_totals(const NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t i = 0; i < 2 * p->channels; i++) p->totals[i] = 0.0;
    for (int64_t task = 0; task < job->tasks; task++)
        for (int half = 0; half < 2; half++)
            for (int64_t at = 0; at < p->lanes; at += p->channels) {
                const float* from = job->sums + (task * 2 + half) * p->lanes + at;
                double* to = p->totals + half * p->channels;
                for (int64_t c = 0; c < p->channels; c++) to[c] += (double)from[c];
            }
}

// Repeat the first entries, one of each channel, until they fill the lanes.
static void norm_repeat(const NormArgs* p, float* values) {
    for (int64_t j = p->channels; j < p->lanes; j++) values[j] = values[j - p->channels];
}

// Mean and variance from differences to the first value of each channel, against cancellation.
template <class T>
static void norm_moments(NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t c = 0; c < p->channels; c++) job->shift[c] = widen(((const T*)p->x)[c]);
    norm_repeat(p, job->shift);
    norm_pass(job, norm_sums_body<T, false>);
    norm_totals(job);
    const double count = (double)(p->total / p->channels);
    for (int64_t c = 0; c < p->channels; c++) {
        double first = p->totals[c] / count, var = p->totals[p->channels + c] / count - first * first;
        p->mean[c] = (float)((double)job->shift[c] + first);
        p->var[c] = (float)(var < 0.0 ? 0.0 : var);
        p->inverse[c] = 1.0f / __builtin_sqrtf(p->var[c] + p->eps);
    }
}

template <class T>
static void norm_forward(NormJob* job) {
    const NormArgs* p = job->p;
    if (p->of_batch) norm_moments<T>(job);
    for (int64_t c = 0; c < p->channels; c++) {
        job->scale[c] = p->weight ? p->inverse[c] * p->weight[c] : p->inverse[c];
        job->shift[c] = (p->bias ? p->bias[c] : 0.0f) - p->mean[c] * job->scale[c];
    }
    norm_repeat(p, job->scale);
    norm_repeat(p, job->shift);
    norm_pass(job, p->other ? norm_forward_body<T, true> : norm_forward_body<T, false>);
}

// The statistics' own gradients count where they are those of the batch.
template <class T>
static void norm_backward(NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t c = 0; c < p->channels; c++) job->shift[c] = p->mean[c];
    norm_repeat(p, job->shift);
    norm_pass(job, norm_sums_body<T, true>);
    norm_totals(job);
    const double count = (double)(p->total / p->channels);
    for (int64_t c = 0; c < p->channels; c++) {
        double inverse = (double)p->inverse[c], second = p->totals[p->channels + c];
        job->scale[c] = p->weight ? p->inverse[c] * p->weight[c] : p->inverse[c];
        job->offset[c] = p->of_batch ? (float)(p->totals[c] / count) : 0.0f;
        job->slope[c] = p->of_batch ? (float)(second / count * inverse * inverse) : 0.0f;
        p->totals[p->channels + c] = second * inverse;
    }
    norm_repeat(p, job->scale);
    norm_repeat(p, job->offset);
    norm_repeat(p, job->slope);
    norm_pass(job, p->rest ? norm_backward_body<T, true> : norm_backward_body<T, false>);
}

static int norm(const NormArgs* p) {
    NormJob job = {p, (rows_of(p) + p->size - 1) / p->size, 0, nullptr, nullptr, nullptr, nullptr, nullptr, streams(p)};
    job.scale = p->room, job.shift = job.scale + p->lanes, job.offset = job.shift + p->lanes;
    job.slope = job.offset + p->lanes, job.sums = job.slope + p->lanes;
    if (p->backward)
        p->dtype == GB_FLOAT32 ? norm_backward<float>(&job) : norm_backward<Bf16>(&job);
    else
        p->dtype == GB_FLOAT32 ? norm_forward<float>(&job) : norm_forward<Bf16>(&job);
    return GB_OK;
}

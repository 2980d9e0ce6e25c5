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
};

GB_INLINE int64_t rows_of(const NormArgs* p) { return (p->total + p->lanes - 1) / p->lanes; }

// Forward: sums of x - shift and of its square. Backward: sums of g and of g (x - shift), g where the mask lets it.
template <class T, bool BACK, bool MASK>
static void norm_sums_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float* __restrict shift = p->shift;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        float* __restrict first = p->sums + task * 2 * lanes;
        float* __restrict second = first + lanes;
        for (int64_t j = 0; j < lanes; j++) first[j] = second[j] = 0.0f;
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T* __restrict x = (const T*)p->x + start;
            const T* __restrict g = BACK ? (const T*)p->g + start : nullptr;
            const uint8_t* __restrict mask = MASK ? p->mask + start : nullptr;
            GB_INDEPENDENT
            for (int64_t j = 0; j < n; j++) {
                float v = widen(x[j]) - shift[j];
                float w = BACK ? widen(g[j]) : v;
                if (MASK) w = mask[j] ? w : 0.0f;
                first[j] += w;
                second[j] += w * v;
            }
        }
    }
}

// y = x scale + shift (+ other), and what is left of it behind a ReLU.
template <class T, bool OTHER, bool MASK>
static void norm_forward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float *__restrict scale = p->scale, *__restrict shift = p->shift;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T* __restrict x = (const T*)p->x + start;
            const T* __restrict other = OTHER ? (const T*)p->other + start : nullptr;
            T* __restrict y = (T*)p->y + start;
            uint8_t* __restrict mask = MASK ? p->mask + start : nullptr;
            GB_INDEPENDENT
            for (int64_t j = 0; j < n; j++) {
                float v = widen(x[j]) * scale[j] + shift[j];
                if (OTHER) v += widen(other[j]);
                if (MASK) mask[j] = !(v <= 0.0f);
                narrow(MASK ? (v > 0.0f || v != v ? v : 0.0f) : v, y + j);
            }
        }
    }
}

// Gradients: of x, (g - offset - (x - shift) slope) scale, and of the shortcut, g where the mask lets it.
template <class T, bool OTHER, bool MASK>
static void norm_backward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float *__restrict scale = p->scale, *__restrict shift = p->shift;
    const float *__restrict offset = p->offset, *__restrict slope = p->slope;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T *__restrict x = (const T*)p->x + start, *__restrict g = (const T*)p->g + start;
            T *__restrict y = (T*)p->y + start, *__restrict rest = OTHER ? (T*)p->rest + start : nullptr;
            const uint8_t* __restrict mask = MASK ? p->mask + start : nullptr;
            GB_INDEPENDENT
            for (int64_t j = 0; j < n; j++) {
                float w = widen(g[j]);
                if (MASK) w = mask[j] ? w : 0.0f;
                if (OTHER) narrow(w, rest + j);
                narrow((w - offset[j] - (widen(x[j]) - shift[j]) * slope[j]) * scale[j], y + j);
            }
        }
    }
}

static int norm_run(const NormArgs* p, void (*body)(void*)) {
    NormJob job = {p, (rows_of(p) + p->size - 1) / p->size, 0};
    gb_parallel(p->total > TASK && job.tasks > 1 ? p->threads : 1, body, &job);
    return GB_OK;
}

template <class T>
static int norm_for(const NormArgs* p) {
    const bool mask = p->mask != nullptr;
    if (p->kind == GB_NORM_SUMS) {
        if (!p->g) return norm_run(p, norm_sums_body<T, false, false>);
        return norm_run(p, mask ? norm_sums_body<T, true, true> : norm_sums_body<T, true, false>);
    }
    if (p->kind == GB_NORM_FORWARD) {
        if (p->other) return norm_run(p, mask ? norm_forward_body<T, true, true> : norm_forward_body<T, true, false>);
        return norm_run(p, mask ? norm_forward_body<T, false, true> : norm_forward_body<T, false, false>);
    }
    if (p->rest) return norm_run(p, mask ? norm_backward_body<T, true, true> : norm_backward_body<T, true, false>);
    return norm_run(p, mask ? norm_backward_body<T, false, true> : norm_backward_body<T, false, false>);
}

static int norm(const NormArgs* p) { return p->dtype == GB_FLOAT32 ? norm_for<float>(p) : norm_for<Bf16>(p); }

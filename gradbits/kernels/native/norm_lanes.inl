// What batch norm does with rows of lanes: sums, results, gradients. Few channels are repeated until they fill `lanes`,
// and the last row may be shorter. Compiled once per instruction set.

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
    int lock;
};

// The largest magnitude of what is written, lane by lane; as integers, magnitudes are in the order of the floats, and
// NaN is above all.
struct Widest {
    uint32_t bits[64];
};

GB_INLINE void widen_to(uint32_t* bits, float v) {
    uint32_t found;
    __builtin_memcpy(&found, &v, 4);
    found &= 0x7fffffffu;
    *bits = found > *bits ? found : *bits;
}

static void settle_widest(float* widest, int* lock, const Widest* w) {
    uint32_t all = 0;
    for (int j = 0; j < 64; j++) all = w->bits[j] > all ? w->bits[j] : all;
    hold(lock);
    uint32_t known;
    __builtin_memcpy(&known, widest, 4);
    if (all > known) __builtin_memcpy(widest, &all, 4);
    release(lock);
}

// What was written in bfloat16 is rounded, which keeps the order.
GB_INLINE void round_widest(float* widest) {
    Bf16 rounded;
    narrow(*widest, &rounded);
    *widest = widen(rounded);
}

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
                                  const float* __restrict shift, int n, T* __restrict y, uint8_t* __restrict mask,
                                  Widest* __restrict w) {
    GB_INDEPENDENT
    for (int j = 0; j < n; j++) {
        float v = widen(x[j]) * scale[j] + shift[j];
        if (OTHER) v += widen(other[j]);
        mask[j] = !(v <= 0.0f);
        v = v > 0.0f || v != v ? v : 0.0f;
        narrow(v, y + j);
        widen_to(w->bits + j, v);
    }
}

template <class T, bool OTHER>
static void norm_forward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    const float *__restrict scale = job->scale, *__restrict shift = job->shift;
    Widest w = {};
    for (int64_t task; (task = gb_take_back(&job->next, job->tasks)) >= 0;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T* __restrict x = (const T*)p->x + start;
            const T* __restrict other = OTHER ? (const T*)p->other + start : nullptr;
            for (int64_t j = 0; j < n; j += NORM_BLOCK) {
                const T* rest = OTHER ? other + j : nullptr;
                T* y = (T*)p->y + start + j;
                uint8_t* mask = p->mask + start + j;
                if (!job->stream) {
                    int some = n - j < NORM_BLOCK ? (int)(n - j) : NORM_BLOCK;
                    norm_forward_lanes<T, OTHER>(x + j, rest, scale + j, shift + j, some, y, mask, &w);
                    continue;
                }
                alignas(64) T held[NORM_BLOCK];
                alignas(64) uint8_t held_mask[NORM_BLOCK];
                norm_forward_lanes<T, OTHER>(x + j, rest, scale + j, shift + j, NORM_BLOCK, held, held_mask, &w);
                stream(y, held);
                stream(mask, held_mask);
            }
        }
    }
    flush();
    settle_widest(p->widest, &job->lock, &w);
}

// Gradients: of x, (g - offset - (x - shift) slope) scale, and of the shortcut, g where the mask lets it.
template <class T, bool OTHER>
GB_INLINE void norm_backward_lanes(const T* __restrict x, const T* __restrict g, const uint8_t* __restrict mask,
                                   const NormJob* job, int64_t at, int n, T* __restrict y, T* __restrict rest,
                                   Widest* __restrict wide) {
    const float *__restrict scale = job->scale + at, *__restrict shift = job->shift + at;
    const float *__restrict offset = job->offset + at, *__restrict slope = job->slope + at;
    GB_INDEPENDENT
    for (int j = 0; j < n; j++) {
        float w = mask[j] ? widen(g[j]) : 0.0f;
        if (OTHER) narrow(w, rest + j);
        float v = (w - offset[j] - (widen(x[j]) - shift[j]) * slope[j]) * scale[j];
        narrow(v, y + j);
        widen_to(wide->bits + j, v);
    }
}

template <class T, bool OTHER>
static void norm_backward_body(void* data) {
    NormJob* job = (NormJob*)data;
    const NormArgs* p = job->p;
    const int64_t rows = rows_of(p), lanes = p->lanes;
    Widest w = {};
    for (int64_t task; (task = gb_take_back(&job->next, job->tasks)) >= 0;) {
        int64_t last = (task + 1) * p->size < rows ? (task + 1) * p->size : rows;
        for (int64_t row = task * p->size; row < last; row++) {
            const int64_t start = row * lanes, left = p->total - start, n = left < lanes ? left : lanes;
            const T *__restrict x = (const T*)p->x + start, *__restrict g = (const T*)p->g + start;
            const uint8_t* __restrict mask = p->mask + start;
            T* rest = OTHER ? (T*)p->rest + start : nullptr;
            for (int64_t j = 0; j < n; j += NORM_BLOCK) {
                T *y = (T*)p->y + start + j, *left = OTHER ? rest + j : nullptr;
                if (!job->stream) {
                    int some = n - j < NORM_BLOCK ? (int)(n - j) : NORM_BLOCK;
                    norm_backward_lanes<T, OTHER>(x + j, g + j, mask + j, job, j, some, y, left, &w);
                    continue;
                }
                alignas(64) T held[NORM_BLOCK], held_rest[NORM_BLOCK];
                norm_backward_lanes<T, OTHER>(x + j, g + j, mask + j, job, j, NORM_BLOCK, held, held_rest, &w);
                stream(y, held);
                if (OTHER) stream(left, held_rest);
            }
        }
    }
    flush();
    settle_widest(p->widest, &job->lock, &w);
}

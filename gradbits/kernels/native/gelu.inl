// GELU and its gradient: x (1/2 + c(x)) and g (1/2 + c'(x)), where c is an odd curve that gelu.py fits by a rational
// function, c(x) = x P(x^2) / Q(x^2) up to |x| = end and +-1/2 beyond. Compiled once per instruction set.

struct GeluJob {
    const GeluArgs* p;
    int64_t next;
    int lock;
};

// Every operation rounds once, in the order that gelu.py gives.
GB_INLINE float share_of(float x, const GeluArgs* p) {
    const float *top = p->curve, *bottom = top + GB_GELU_TOP, end = p->end;
    float v = x < -end ? -end : x;  // NaN stays
    v = v > end ? end : v;
    float t = v * v, a = top[GB_GELU_TOP - 1], b = bottom[GB_GELU_BOTTOM - 1];
    GB_UNROLL for (int k = GB_GELU_TOP - 2; k >= 0; k--) a = a * t + top[k];
    GB_UNROLL for (int k = GB_GELU_BOTTOM - 2; k >= 0; k--) b = b * t + bottom[k];
    float c = v * a / b;
    c = x <= -end ? -0.5f : c;
    c = x >= end ? 0.5f : c;
    return 0.5f + c;
}

GB_INLINE void narrow_lanes(const float* from, int n, float* to) { __builtin_memcpy(to, from, sizeof(float) * (size_t)n); }
GB_INLINE void narrow_lanes(const float* from, int n, Bf16* to) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        Floats some;
        __builtin_memcpy(&some, from + i, sizeof some);
        Halves half = to_bf16(some);
        __builtin_memcpy(to + i, &half, sizeof half);
    }
    for (; i < n; i++) narrow(from[i], to + i);
}

template <class T, bool BACK>
GB_INLINE void gelu_lanes(const T* __restrict x, const T* __restrict g, const GeluArgs* p, int n, T* __restrict y,
                          Widest* __restrict w) {
    float held[NORM_BLOCK];
    GB_INDEPENDENT
    for (int j = 0; j < n; j++) {
        float v = widen(x[j]);
        held[j] = (BACK ? widen(g[j]) : v) * share_of(v, p);
        widen_to(w->bits + j, held[j]);
    }
    narrow_lanes(held, n, y);
}

template <class T, bool BACK>
static void gelu_body(void* data) {
    GeluJob* job = (GeluJob*)data;
    const GeluArgs args = *job->p, *p = &args;  // a copy that no store can change, so that it stays in registers
    const bool past = p->total > NORM_LARGE && ((uintptr_t)p->y & 63) == 0;
    Widest w = {};
    for (int64_t first; (first = gb_take(&job->next) * TASK) < p->total;) {
        const int64_t last = first + TASK < p->total ? first + TASK : p->total;
        for (int64_t at = first; at < last; at += NORM_BLOCK) {
            const T *x = (const T*)p->x + at, *g = BACK ? (const T*)p->g + at : nullptr;
            T* y = (T*)p->y + at;
            const int n = last - at < NORM_BLOCK ? (int)(last - at) : NORM_BLOCK;
            if (!past || n < NORM_BLOCK) {
                gelu_lanes<T, BACK>(x, g, p, n, y, &w);
                continue;
            }
            alignas(64) T held[NORM_BLOCK];
            gelu_lanes<T, BACK>(x, g, p, NORM_BLOCK, held, &w);
            stream(y, held);
        }
    }
    flush();
    settle_widest(p->widest, &job->lock, &w);
}

static int gelu(const GeluArgs* p) {
    *p->widest = 0.0f;
    GeluJob job = {p, 0, 0};
    const bool half = p->dtype != GB_FLOAT32;
    void (*body)(void*) = p->g ? (half ? gelu_body<Bf16, true> : gelu_body<float, true>)
                               : (half ? gelu_body<Bf16, false> : gelu_body<float, false>);
    gb_parallel(p->total > TASK ? p->threads : 1, body, &job);
    if (half) round_widest(p->widest);
    return GB_OK;
}

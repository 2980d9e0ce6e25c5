// `grad_weight` of depthwise convolutions.

// 16 codes, of which n count.
GB_INLINE Words codes_at(const int8_t* from, int64_t n) {
    int8_t some[16] = {};
    if (n < 16) {
        for (int64_t i = 0; i < n; i++) some[i] = from[i];
        from = some;
    }
#ifdef GB_VNNI
    return (Words)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    int32_t wide[16];
    for (int i = 0; i < 16; i++) wide[i] = from[i];
    return words_at(wide);
#endif
}

// A line of output positions, and the taps of the first two axes that meet the input there.
struct DepthLine {
    int64_t sample, i0, i1;
    const int8_t* x;  // of the sample
};

GB_INLINE DepthLine line_at(const ProductArgs* p, int64_t index) {
    DepthLine l;
    l.i1 = index % p->count[1], l.i0 = index / p->count[1] % p->count[0], l.sample = index / p->count[1] / p->count[0];
    l.x = p->x + l.sample * p->x_sample;
    return l;
}

// Input coordinates of a tap, or null where it is in the padding.
GB_INLINE const int8_t* tap_at(const ProductArgs* p, const DepthLine* l, int64_t t0, int64_t t1) {
    int64_t a0 = l->i0 * p->stride[0] - p->padding[0] + t0 * p->dilation[0];
    int64_t a1 = l->i1 * p->stride[1] - p->padding[1] + t1 * p->dilation[1];
    if (!inside(a0, p->size[0]) || !inside(a1, p->size[1])) return nullptr;
    return l->x + a0 * p->x_axis[0] + a1 * p->x_axis[1];
}

// Of `rows` positions from i2 on, those whose tap t2 lies inside the input; returns the column of position i2.
GB_INLINE int64_t depth_range(const ProductArgs* p, int64_t i2, int64_t rows, int64_t t2, int64_t* first, int64_t* last) {
    const int64_t s = p->stride[2], column = i2 * s - p->padding[2] + t2 * p->dilation[2];
    *first = column < 0 ? (-column + s - 1) / s : 0;
    *last = column >= p->size[2] ? 0 : least((p->size[2] - 1 - column) / s + 1, rows);
    return column;
}

static void depth_add(DepthJob* job, int32_t* own) {
    hold(&job->lock);
    for (int64_t i = 0; i < job->taps * job->pitch; i++) job->totals[i] += own[i], own[i] = 0;
    release(&job->lock);
}

template <bool WHOLE>
GB_INLINE void depth_tap(const ProductArgs* p, const int8_t* x, const int8_t* g, int64_t first, int64_t last, int64_t n,
                         int32_t* sums) {
    Words a[4];
    GB_UNROLL for (int v = 0; v < 4; v++) a[v] = words_at(sums + v * 16);
    x += first * p->stride[2] * p->x_axis[2], g += first * p->w_tap[2];
    for (int64_t i = first; i < last; i++, x += p->stride[2] * p->x_axis[2], g += p->w_tap[2])
        GB_UNROLL for (int v = 0; v < 4; v++)
            if (WHOLE || v * 16 < n) {
                const int64_t some = WHOLE ? 16 : n - v * 16;
                a[v] += codes_at(x + v * 16, some) * codes_at(g + v * 16, some);
            }
    GB_UNROLL for (int v = 0; v < 4; v++) __builtin_memcpy(sums + v * 16, &a[v], 64);
}

static void depth_columns_body(void* data) {
    DepthJob* job = (DepthJob*)data;
    const ProductArgs* p = job->p;
    int32_t* own = (int32_t*)__builtin_calloc((size_t)(job->taps * job->pitch), sizeof(int32_t));
    if (!own) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    int64_t terms = 0;
    for (int64_t index; (index = gb_take(&job->next)) < job->lines;) {
        const DepthLine l = line_at(p, index);
        const int8_t* g = p->w + l.sample * p->w_channel + l.i0 * p->w_tap[0] + l.i1 * p->w_tap[1];
        for (int64_t begin = 0; begin < p->count[2]; begin += DEPTH_TERMS) {
            const int64_t end = least(begin + DEPTH_TERMS, p->count[2]);
            if (terms + end - begin > DEPTH_TERMS) depth_add(job, own), terms = 0;
            terms += end - begin;
            for (int64_t tap = 0; tap < job->taps; tap++) {
                const int8_t* x = tap_at(p, &l, tap / (p->taps[1] * p->taps[2]), tap / p->taps[2] % p->taps[1]);
                if (!x) continue;
                int64_t first, last, column = depth_range(p, 0, end, tap % p->taps[2], &first, &last);
                if (first < begin) first = begin;
                for (int64_t c = 0; c < p->groups && first < last; c += DEPTH_BLOCK) {
                    const int64_t n = least(p->groups - c, DEPTH_BLOCK);
                    int32_t* sums = own + tap * job->pitch + c;
                    const int8_t* from = x + column * p->x_axis[2] + c;
                    n == DEPTH_BLOCK ? depth_tap<true>(p, from, g + c, first, last, n, sums)
                                     : depth_tap<false>(p, from, g + c, first, last, n, sums);
                }
            }
        }
    }
    depth_add(job, own);
    __builtin_free(own);
}

static int depth_columns(const ProductArgs* p) {
    DepthJob job = {};
    depth_lanes(&job, p);
    if (job.taps * p->groups == 0) return GB_OK;
    job.how = ways(&job.lanes, 0);
    job.totals = (int64_t*)__builtin_calloc((size_t)(job.taps * job.pitch + 16), sizeof(int64_t));
    if (!job.totals) return GB_NO_MEMORY;
    gb_parallel(job.lines > 1 ? p->threads : 1, depth_columns_body, &job);
    for (int64_t tap = 0; tap < job.taps && !job.failed; tap++) {
        Where where = {tap * p->r_position, 0, tap};
        finish(&job.lanes, job.totals + tap * job.pitch, job.pitch, 1, p->groups, &where, 0, 0, job.how);
    }
    flush();
    __builtin_free(job.totals);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

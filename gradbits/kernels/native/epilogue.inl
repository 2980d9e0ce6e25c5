// Exact sums to floats: fl(sum) * scale + terms, one rounding per operation, then the activation and the cast, then to
// where they belong.

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

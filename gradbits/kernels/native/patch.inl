// Patches of a convolution's input, one row at a time, where they are needed: never all of them in memory.

GB_INLINE int64_t volume(const int64_t* n) { return n[0] * n[1] * n[2]; }

// A position of the result: its sample and coordinates.
struct Place {
    int64_t sample, at[3];
};

GB_INLINE Place place_of(const ProductArgs* p, int64_t row) {
    Place s;
    s.at[2] = row % p->count[2], row /= p->count[2];
    s.at[1] = row % p->count[1], row /= p->count[1];
    s.at[0] = row % p->count[0], s.sample = row / p->count[0];
    return s;
}

GB_INLINE void advance(const ProductArgs* p, Place* s) {
    if (++s->at[2] < p->count[2]) return;
    s->at[2] = 0;
    if (++s->at[1] < p->count[1]) return;
    s->at[1] = 0;
    if (++s->at[0] < p->count[0]) return;
    s->at[0] = 0;
    s->sample++;
}

GB_INLINE int64_t position_of(const ProductArgs* p, const Place* s) {
    return p->first + s->at[0] * p->step[0] + s->at[1] * p->step[1] + s->at[2] * p->step[2];
}

// Write n codes, and up to 63 more bytes of anything behind them.
GB_INLINE int8_t* put(int8_t* to, const int8_t* from, int64_t n) {
#ifdef GB_VNNI
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    if (i < n) _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi8((1ull << (n - i)) - 1, from + i));
#else
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
#endif
    return to + n;
}

GB_INLINE int16_t* put(int16_t* to, const int8_t* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
    return to + n;
}

template <class T>
GB_INLINE T* put_zeros(T* to, int64_t n) {
#ifdef GB_VNNI
    for (int64_t i = 0; i < n; i += 64) _mm512_storeu_si512(to + i, _mm512_setzero_si512());
#else
    for (int64_t i = 0; i < n; i++) to[i] = 0;
#endif
    return to + n;
}

// Which taps and channels of a patch are wanted; `from` holds the coordinates of the first tap.
struct Part {
    int64_t tap, last_tap, channel, last_channel, from[3];
};

GB_INLINE Part part_of(const ProductArgs* p, int64_t tap, int64_t last_tap, int64_t channel, int64_t last_channel) {
    int64_t line = tap / p->taps[2];
    return {tap, last_tap, channel, last_channel, {line / p->taps[1], line % p->taps[1], tap % p->taps[2]}};
}

// Write one row: for each tap of the part its channels, zeros outside the input. Returns the end.
template <class T>
GB_INLINE T* put_patch(const ProductArgs* p, const int8_t* x, const Place* s, const Part* part, T* to) {
    const int8_t* sample = x + s->sample * p->x_sample;
    const int64_t width = part->last_channel - part->channel;
    const bool adjacent = p->dilation[2] == 1 && p->x_axis[2] == width;
    const int64_t left = s->at[2] * p->stride[2] - p->padding[2];
    int64_t first = part->from[2], line = part->from[1];
    int64_t i0 = s->at[0] * p->stride[0] - p->padding[0] + part->from[0] * p->dilation[0];
    int64_t i1 = s->at[1] * p->stride[1] - p->padding[1] + line * p->dilation[1];
    for (int64_t more = part->last_tap - part->tap; more > 0;) {
        int64_t last = first + more < p->taps[2] ? first + more : p->taps[2];
        if (i0 < 0 || i0 >= p->size[0] || i1 < 0 || i1 >= p->size[1]) {
            to = put_zeros(to, (last - first) * width);
        } else {
            const int8_t* from = sample + i0 * p->x_axis[0] + i1 * p->x_axis[1] + part->channel;
            if (adjacent) {
                int64_t begin = left + first, end = left + last;
                int64_t a = begin < 0 ? 0 : begin, b = end > p->size[2] ? p->size[2] : end;
                if (a >= b) {
                    to = put_zeros(to, (last - first) * width);
                } else {
                    if (a > begin) to = put_zeros(to, (a - begin) * width);
                    to = put(to, from + a * width, (b - a) * width);
                    if (end > b) to = put_zeros(to, (end - b) * width);
                }
            } else {
                for (int64_t k = first; k < last; k++) {
                    int64_t i2 = left + k * p->dilation[2];
                    bool inside = i2 >= 0 && i2 < p->size[2];
                    to = inside ? put(to, from + i2 * p->x_axis[2], width) : put_zeros(to, width);
                }
            }
        }
        more -= last - first;
        first = 0;
        i1 += p->dilation[1];
        if (++line < p->taps[1]) continue;
        line = 0;
        i1 -= p->taps[1] * p->dilation[1];
        i0 += p->dilation[0];
    }
    return to;
}

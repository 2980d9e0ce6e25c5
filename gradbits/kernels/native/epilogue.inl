// Exact sums to floats: fl(sum) * scale + terms, one rounding per operation, then the cast.

GB_INLINE const float* at(const Operand* o, int64_t group, int64_t sample, int64_t position, int64_t channel) {
    return o->values + group * o->group + sample * o->sample + position * o->position + channel * o->channel;
}

template <bool TIMES>
GB_INLINE void combine(float* y, int n, const float* v, int64_t step) {
    if (step == 0) {
        float value = *v;
        for (int i = 0; i < n; i++) y[i] = TIMES ? y[i] * value : y[i] + value;
    } else {
        for (int i = 0; i < n; i++) y[i] = TIMES ? y[i] * v[i] : y[i] + v[i];
    }
}

GB_INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0u : rounded);
}

GB_INLINE bool dense_channels(const ProductArgs* p) {
    bool yes = p->r_channel == 1 && (uint64_t)p->epilogue.scale.channel <= 1;
    for (int t = 0; t < p->epilogue.count; t++) yes = yes && (uint64_t)p->epilogue.terms[t].channel <= 1;
    return yes;
}

// Sixteen channels at once: loops of this length become one instruction.
template <class S>
GB_INLINE void finish16(const ProductArgs* p, const S* sum, int64_t to, int64_t group, int64_t sample, int64_t position,
                        int64_t channel) {
    const Epilogue* e = &p->epilogue;
    float y[16];
    for (int i = 0; i < 16; i++) y[i] = (float)sum[i];
    combine<true>(y, 16, at(&e->scale, group, sample, position, channel), e->scale.channel);
    for (int t = 0; t < e->count; t++)
        combine<false>(y, 16, at(&e->terms[t], group, sample, position, channel), e->terms[t].channel);
    if (e->dtype == GB_FLOAT32) {
        __builtin_memcpy((float*)p->result + to, y, sizeof y);
    } else {
        uint16_t narrow[16];
        for (int i = 0; i < 16; i++) narrow[i] = to_bf16(y[i]);
        __builtin_memcpy((uint16_t*)p->result + to, narrow, sizeof narrow);
    }
}

// Finish n adjacent channels of one position; S is int32_t or int64_t.
template <class S>
static void finish_span(const ProductArgs* p, const S* sum, int64_t n, int64_t group, int64_t sample, int64_t position,
                        int64_t channel) {
    const Epilogue* e = &p->epilogue;
    int64_t to = group * p->r_group + sample * p->r_sample + position * p->r_position + channel * p->r_channel, i = 0;
    if (dense_channels(p))
        for (; i + 16 <= n; i += 16) finish16(p, sum + i, to + i, group, sample, position, channel + i);
    for (; i < n; i++) {
        float y = (float)sum[i];
        y *= *at(&e->scale, group, sample, position, channel + i);
        for (int t = 0; t < e->count; t++) y += *at(&e->terms[t], group, sample, position, channel + i);
        if (e->dtype == GB_FLOAT32)
            ((float*)p->result)[to + i * p->r_channel] = y;
        else
            ((uint16_t*)p->result)[to + i * p->r_channel] = to_bf16(y);
    }
}

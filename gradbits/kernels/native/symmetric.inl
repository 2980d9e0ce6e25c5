// Values to codes of one symmetric scale: range, scale and codes in one call. Compiled once per instruction set.

static float width_of(const QuantizeArgs* q) {
    float low, high;
    RangeArgs args = {q->x, &low, &high, 1, 1, q->inner, q->dtype, q->threads};
    range(&args);
    return -low > high || low != low ? -low : high;
}

static int symmetric(const SymmetricArgs* p) {
    QuantizeArgs q = p->quantize;
    const float width = p->width ? *p->width : width_of(&q), least_scale = 0x1p-126f;
    float scale = width;
    if (width > 0.0f) {
        scale = width / p->largest;
        if (scale < least_scale) scale = least_scale;
    }
    scale += width - width;  // adds 0, or NaN where the width is not finite
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    p->found[0] = scale, p->found[1] = -width, p->found[2] = width;
    q.r = &inverse, q.low = -p->largest, q.high = p->largest;
    return quantize(&q);
}

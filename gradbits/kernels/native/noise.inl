// The noise of gradbits/core/noise.py.

GB_INLINE float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

typedef int16_t __attribute__((may_alias)) HalfWord;

// Noise bits of elements first .. first + n - 1. Returns where the first element's are.
GB_INLINE const HalfWord* noise_bits(uint32_t* words, int64_t first, int n, int32_t k0, int32_t k1) {
    uint32_t start = (uint32_t)(first >> 1) + (uint32_t)k0;
    int count = (int)(((first + n + 1) >> 1) - (first >> 1));
    for (int i = 0; i < count; i++) {
        uint32_t x = start + (uint32_t)i;
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= x >> 15;
        x += (uint32_t)k1;
        x *= 0x846ca68bu;
        x ^= x >> 16;
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        x = x << 16 | x >> 16;
#endif
        words[i] = x;
    }
    return (const HalfWord*)words + (first & 1);
}

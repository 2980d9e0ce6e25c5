// Codes to words: a word holds G codes that follow each other along the contraction.

#ifdef GB_VNNI
// VNNI multiplies unsigned by signed bytes: one operand travels as code + 128, which turns the sign bit. Its part of the
// sums, 128 times the sum of the other operand, is taken off again by the `start` of a tile.
typedef uint32_t Flip;
static const Flip FLIP = 0x80808080u, PLAIN = 0;
static const int G = 4;
#else
typedef uint32_t Flip;
static const Flip FLIP = 0, PLAIN = 0;
static const int G = 2;  // int16 codes
#endif

#ifdef GB_VNNI
// sum += the products of four unsigned and four signed bytes in every lane.
#ifdef __clang__  // which looks at the instruction set of the file, not of the function, before it takes an operand
#define GB_DOT(sum, u, s) sum = _mm512_dpbusd_epi32(sum, u, s)
#else  // GCC moves accumulators about for the intrinsic
#define GB_DOT(sum, u, s) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s))
#endif

// Up to 16 lines of up to 16 adjacent codes, of which `there` exist: word k of line i to to[k * pitch + i].
GB_INLINE void weave_lines(const int8_t* x, int64_t line, __mmask16 there, int codes, int lines, uint32_t* to,
                           int64_t pitch, __m512i flip) {
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i odd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    __m512i r[4];
    if (line == 16 && there == 0xffff) {
        for (int q = 0; q < 4; q++) {
            int left = lines - 4 * q;
            r[q] = _mm512_maskz_loadu_epi32(left >= 4 ? 0xffff : left > 0 ? (__mmask16)((1u << 4 * left) - 1) : 0, x + q * 64);
        }
    } else {
        GB_UNROLL for (int q = 0; q < 4; q++) {
            __m128i part[4];
            GB_UNROLL for (int i = 0; i < 4; i++)
                part[i] = _mm_maskz_loadu_epi8(4 * q + i < lines ? there : 0, x + (4 * q + i) * line);
            r[q] = _mm512_inserti32x4(_mm512_castsi128_si512(part[0]), part[1], 1);
            r[q] = _mm512_inserti32x4(_mm512_inserti32x4(r[q], part[2], 2), part[3], 3);
        }
    }
    for (int q = 0; q < 4; q++) r[q] = _mm512_xor_si512(r[q], flip);
    __m512i a = _mm512_permutex2var_epi32(r[0], even, r[1]), b = _mm512_permutex2var_epi32(r[2], even, r[3]);
    __m512i c = _mm512_permutex2var_epi32(r[0], odd, r[1]), d = _mm512_permutex2var_epi32(r[2], odd, r[3]);
    const __mmask16 some = (__mmask16)((1u << lines) - 1);
    _mm512_mask_storeu_epi32(to, some, _mm512_shuffle_i64x2(a, b, 0x44));
    if (codes > 4) _mm512_mask_storeu_epi32(to + pitch, some, _mm512_shuffle_i64x2(a, b, 0xee));
    if (codes > 8) _mm512_mask_storeu_epi32(to + 2 * pitch, some, _mm512_shuffle_i64x2(c, d, 0x44));
    if (codes > 12) _mm512_mask_storeu_epi32(to + 3 * pitch, some, _mm512_shuffle_i64x2(c, d, 0xee));
}

// Four rows of up to 16 adjacent lines, one in each quarter of `rows`, to the words of these lines.
GB_INLINE void weave_rows(__m512i rows, int lines, uint32_t* to, __m512i flip) {
    const __m512i quarters = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i w = _mm512_xor_si512(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, rows), bytes), flip);
    if (lines == 16)
        _mm512_storeu_si512(to, w);
    else
        _mm512_mask_storeu_epi32(to, (__mmask16)((1u << lines) - 1), w);
}

GB_INLINE __m512i quarters_of(const __m128i* row) {
    __m512i all = _mm512_inserti32x4(_mm512_castsi128_si512(row[0]), row[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(all, row[2], 2), row[3], 3);
}

// Codes k .. k + 3 of 64 adjacent lines to words: 16 lines to each of `to`, to + panel, ...
GB_INLINE void weave_wide(const int8_t* x, int64_t code, int64_t first, int64_t last, uint32_t* to, int64_t panel,
                          __m512i flip) {
    __m512i row[4];
    GB_UNROLL for (int g = 0; g < 4; g++)
        row[g] = g >= first && g < last ? _mm512_loadu_si512(x + g * code) : _mm512_setzero_si512();
    __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpacklo_epi8(row[2], row[3]);
    __m512i c = _mm512_unpackhi_epi8(row[0], row[1]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    row[0] = _mm512_unpacklo_epi16(a, b), row[1] = _mm512_unpackhi_epi16(a, b);  // four lines of every 16
    row[2] = _mm512_unpacklo_epi16(c, d), row[3] = _mm512_unpackhi_epi16(c, d);
    a = _mm512_shuffle_i32x4(row[0], row[1], 0x44), b = _mm512_shuffle_i32x4(row[0], row[1], 0xee);
    c = _mm512_shuffle_i32x4(row[2], row[3], 0x44), d = _mm512_shuffle_i32x4(row[2], row[3], 0xee);
    _mm512_storeu_si512(to, _mm512_xor_si512(_mm512_shuffle_i32x4(a, c, 0x88), flip));
    _mm512_storeu_si512(to + panel, _mm512_xor_si512(_mm512_shuffle_i32x4(a, c, 0xdd), flip));
    _mm512_storeu_si512(to + 2 * panel, _mm512_xor_si512(_mm512_shuffle_i32x4(b, d, 0x88), flip));
    _mm512_storeu_si512(to + 3 * panel, _mm512_xor_si512(_mm512_shuffle_i32x4(b, d, 0xdd), flip));
}
#endif

// Word k of line i, the codes x[i * line + (k G + g) * code], goes to to[k * pitch + i]; codes outside first .. last - 1
// are zero, and x is not read there.
static void weave(const int8_t* x, int64_t line, int64_t code, int64_t lines, int64_t codes, int64_t first, int64_t last,
                  uint32_t* to, int64_t pitch, Flip flip) {
#ifdef GB_VNNI
    const __m512i turn = _mm512_set1_epi32((int)flip);
    if (code == 1 && line != 1) {
        for (int64_t k = 0; k < codes; k += 16) {
            int some = (int)(codes - k < 16 ? codes - k : 16);
            uint32_t there = last - k >= 16 ? 0xffffu : last > k ? (1u << (last - k)) - 1 : 0;
            if (first > k) there &= first - k < 16 ? 0xffffu << (first - k) : 0;
            for (int64_t i = 0; i < lines; i += 16)
                weave_lines(x + i * line + k, line, (__mmask16)there, some, (int)(lines - i < 16 ? lines - i : 16),
                            to + k / G * pitch + i, pitch, turn);
        }
        return;
    }
    for (; line == 1 && lines >= 64; lines -= 64, x += 64, to += 64)
        for (int64_t k = 0; k < codes; k += G)
            weave_wide(x + k * code, code, first - k, last - k, to + k / G * pitch, 16, turn);
    for (int64_t k = 0; k < codes; k += G)
        for (int64_t i = 0; i < lines; i += 16) {
            int n = (int)(lines - i < 16 ? lines - i : 16);
            __m128i row[G];
            if (line == 1 && n == 16 && k >= first && k + G <= last) {
                const int8_t* from = x + i + k * code;
                GB_UNROLL for (int g = 0; g < G; g++) row[g] = _mm_loadu_si128((const __m128i*)(from + g * code));
                const __m512i all = code == 16 ? _mm512_loadu_si512(from) : quarters_of(row);
                weave_rows(all, 16, to + k / G * pitch + i, turn);
                continue;
            }
            for (int g = 0; g < G; g++) {
                const int8_t* from = x + i * line + (k + g) * code;
                row[g] = _mm_setzero_si128();
                if (k + g < first || k + g >= last) continue;
                if (line == 1) {
                    row[g] = n == 16 ? _mm_loadu_si128((const __m128i*)from)
                                     : _mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), from);
                } else if (line == 2 && n == 16) {  // every second of 31 codes
                    __m128i low = _mm_loadu_si128((const __m128i*)from), high = _mm_loadu_si128((const __m128i*)(from + 15));
                    row[g] = _mm_packus_epi16(_mm_and_si128(low, _mm_set1_epi16(0xff)), _mm_srli_epi16(high, 8));
                } else {
                    int8_t copy[16] = {0};
                    for (int j = 0; j < n; j++) copy[j] = from[j * line];
                    row[g] = _mm_loadu_si128((const __m128i*)copy);
                }
            }
            weave_rows(quarters_of(row), n, to + k / G * pitch + i, turn);
        }
#else
    (void)flip;
    for (int64_t k = 0; k < codes; k += G) {
        uint32_t* row = to + k / G * pitch;
        for (int64_t i = 0; i < lines; i++) row[i] = 0;
        for (int g = 0; g < G; g++) {
            if (k + g < first || k + g >= last) continue;
            const int8_t* from = x + (k + g) * code;
            for (int64_t i = 0; i < lines; i++) row[i] |= (uint32_t)(uint16_t)(int16_t)from[i * line] << (16 * g);
        }
    }
#endif
}

// `weave` for four panels of 16 lines, `panel` words apart, if their codes are adjacent; returns whether they are.
static bool weave_panels(const int8_t* x, int64_t line, int64_t code, int64_t lines, int64_t codes, int64_t first,
                         int64_t last, uint32_t* to, int64_t panel, Flip flip) {
#ifdef GB_VNNI
    if (line != 1 || lines < 64) return false;
    const __m512i turn = _mm512_set1_epi32((int)flip);
    for (int64_t k = 0; k < codes; k += G)
        weave_wide(x + k * code, code, first - k, last - k, to + k / G * 16, panel, turn);
    return true;
#else
    (void)x, (void)line, (void)code, (void)lines, (void)codes, (void)first, (void)last, (void)to, (void)panel, (void)flip;
    return false;
#endif
}

// Words of codes 0.
GB_INLINE void weave_zeros(uint32_t* to, int64_t n, Flip flip) {
    for (int64_t i = 0; i < n; i++) to[i] = flip;
}

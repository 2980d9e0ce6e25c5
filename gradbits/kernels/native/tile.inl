// Sums of products of a tile: MR rows by NV * 16 columns, held in registers over a piece of the contraction.
//
// Codes travel in 32-bit words of G codes that follow each other along the contraction: four int8 codes for the dot
// product of VNNI, two int16 codes otherwise. Operand b lies in panels of 16 columns, [word][16]. Operand a lies in rows
// (ROWS: [row][word]) or interleaved (WOVEN: [word][row]); its strides are constants, so that addresses cost nothing.

#ifdef GB_VNNI
typedef int8_t Code;
// VNNI multiplies unsigned by signed: b travels as b + 128, and 128 times the sum of a's row is taken off again. The
// sums may wrap around on the way; modulo 2^32 they come out right.
static const uint32_t FLIP = 0x80808080u;
#else
typedef int16_t Code;
static const uint32_t FLIP = 0;
#endif

static const int G = 4 / (int)sizeof(Code);  // codes in a word
static const int PIECE = 1024;               // codes of the contraction that one call of a tile covers
static const int ROOM = PIECE / G + 16;      // words of a row of a, with room to write past its end
static const int BLOCK_ROWS = 48;            // rows of a that are laid out together
static const int64_t SAFE = 65536;           // products of two codes whose sum surely fits in int32

enum { ROWS, WOVEN };

typedef void (*Tile)(const uint32_t* a, const uint32_t* b, int64_t panel, int words, int32_t* c, int64_t ldc,
                     const int32_t* start);

// c = start (one a row) + c if ADD + products
#ifdef GB_VNNI
template <int MR, int NV, int LAYOUT, bool ADD>
static void tile(const uint32_t* a, const uint32_t* b, int64_t panel, int words, int32_t* c, int64_t ldc,
                 const int32_t* start) {
    __m512i sum[MR][NV];
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < NV; v++) {
            sum[m][v] = _mm512_set1_epi32(start[m]);
            if (ADD) sum[m][v] = _mm512_add_epi32(sum[m][v], _mm512_loadu_si512(c + m * ldc + v * 16));
        }
    for (int k = 0; k < words; k++) {
        __m512i column[NV];
        GB_UNROLL for (int v = 0; v < NV; v++) column[v] = _mm512_loadu_si512(b + v * panel + k * 16);
        GB_UNROLL for (int m = 0; m < MR; m++) {
            const uint32_t* word = LAYOUT == ROWS ? a + m * ROOM + k : a + k * BLOCK_ROWS + m;
            if (NV == 1) {
                asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[m][0]) : "v"(column[0]), "m"(*word));
            } else {
                __m512i row = _mm512_set1_epi32((int)*word);
                // the intrinsic makes compilers move accumulators about
                GB_UNROLL for (int v = 0; v < NV; v++) asm("vpdpbusd %2, %1, %0" : "+v"(sum[m][v]) : "v"(column[v]), "v"(row));
            }
        }
    }
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < NV; v++) _mm512_storeu_si512(c + m * ldc + v * 16, sum[m][v]);
}
static const int WIDEST = 3;
GB_INLINE constexpr int most_rows(int panels) { return 24 / panels; }
#elif defined(__AVX2__)
template <int MR, int NV, int LAYOUT, bool ADD>
static void tile(const uint32_t* a, const uint32_t* b, int64_t, int words, int32_t* c, int64_t ldc,
                 const int32_t* start) {
    __m256i sum[MR][2];
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < 2; v++) {
            sum[m][v] = _mm256_set1_epi32(start[m]);
            if (ADD) sum[m][v] = _mm256_add_epi32(sum[m][v], _mm256_loadu_si256((__m256i*)(c + m * ldc + v * 8)));
        }
    for (int k = 0; k < words; k++) {
        __m256i left = _mm256_loadu_si256((const __m256i*)(b + k * 16));
        __m256i right = _mm256_loadu_si256((const __m256i*)(b + k * 16 + 8));
        GB_UNROLL for (int m = 0; m < MR; m++) {
            const uint32_t* word = LAYOUT == ROWS ? a + m * ROOM + k : a + k * BLOCK_ROWS + m;
            __m256i row = _mm256_set1_epi32((int)*word);
            sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(row, left));
            sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(row, right));
        }
    }
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < 2; v++) _mm256_storeu_si256((__m256i*)(c + m * ldc + v * 8), sum[m][v]);
}
static const int WIDEST = 1;
GB_INLINE constexpr int most_rows(int) { return 6; }
#else
template <int MR, int NV, int LAYOUT, bool ADD>
static void tile(const uint32_t* a, const uint32_t* b, int64_t, int words, int32_t* c, int64_t ldc,
                 const int32_t* start) {
    for (int m = 0; m < MR; m++) {
        int32_t sum[16];
        for (int j = 0; j < 16; j++) sum[j] = start[m] + (ADD ? c[m * ldc + j] : 0);
        for (int k = 0; k < words; k++) {
            uint32_t word = LAYOUT == ROWS ? a[m * ROOM + k] : a[k * BLOCK_ROWS + m];
            int32_t low = (int16_t)word, high = (int32_t)word >> 16;
            for (int j = 0; j < 16; j++) {
                uint32_t column = b[k * 16 + j];
                sum[j] += low * (int16_t)column + high * ((int32_t)column >> 16);
            }
        }
        for (int j = 0; j < 16; j++) c[m * ldc + j] = sum[j];
    }
}
static const int WIDEST = 1;
GB_INLINE constexpr int most_rows(int) { return 4; }
#endif

template <int MR, int NV, int LAYOUT, bool ADD>
static Tile tile_for(int rows) {
    if (rows == MR) return tile<MR, NV, LAYOUT, ADD>;
    if constexpr (MR > 1) return tile_for<MR - 1, NV, LAYOUT, ADD>(rows);
    return nullptr;
}

template <int LAYOUT, bool ADD>
static Tile find_tile(int rows, int panels) {
    if (panels == 1) return tile_for<most_rows(1), 1, LAYOUT, ADD>(rows);
    if constexpr (WIDEST > 1) {
        if (panels == 2) return tile_for<most_rows(2), 2, LAYOUT, ADD>(rows);
        return tile_for<most_rows(3), 3, LAYOUT, ADD>(rows);
    }
    return nullptr;
}

// Sums of up to BLOCK_ROWS rows by `panels` panels: c = (add ? c : 0) + start + a * b.
template <int LAYOUT>
static void block(const uint32_t* a, const uint32_t* b, int64_t panel, int rows, int64_t panels, int words, int32_t* c,
                  int64_t ldc, const int32_t* start, bool add) {
    for (int64_t p = 0; p < panels;) {
        int64_t left = panels - p;
        int wide = WIDEST == 1 || left == 1 ? 1 : left % 3 == 0 ? 3 : 2;
        int most = most_rows(wide);
        for (int m = 0; m < rows; m += most) {
            int height = rows - m < most ? rows - m : most;
            Tile run = add ? find_tile<LAYOUT, true>(height, wide) : find_tile<LAYOUT, false>(height, wide);
            run(LAYOUT == ROWS ? a + m * ROOM : a + m, b + p * panel, panel, words, c + m * ldc + p * 16, ldc, start + m);
        }
        p += wide;
    }
}

// Words of G rows of codes: word i holds the codes i of every row. Exactly 16 words, for the compiler's sake.
#ifdef GB_VNNI
GB_INLINE void weave16(uint32_t* to, const int8_t* const* row, uint32_t flip) {
    __m128i r[4];
    for (int i = 0; i < 4; i++) r[i] = _mm_xor_si128(_mm_loadu_si128((const __m128i*)row[i]), _mm_set1_epi32((int)flip));
    __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpacklo_epi8(r[2], r[3]);
    __m128i c = _mm_unpackhi_epi8(r[0], r[1]), d = _mm_unpackhi_epi8(r[2], r[3]);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128((__m128i*)(to + 4), _mm_unpackhi_epi16(a, b));
    _mm_storeu_si128((__m128i*)(to + 8), _mm_unpacklo_epi16(c, d));
    _mm_storeu_si128((__m128i*)(to + 12), _mm_unpackhi_epi16(c, d));
}
#else
GB_INLINE void weave16(uint32_t* to, const int8_t* const* row, uint32_t) {
    uint32_t words[16];  // `to` might be `row`, as far as the compiler knows
    for (int i = 0; i < 16; i++)
        words[i] = (uint32_t)(uint16_t)(int16_t)row[0][i] | (uint32_t)(uint16_t)(int16_t)row[1][i] << 16;
    __builtin_memcpy(to, words, sizeof words);
}
#endif

// Sums of products of a tile: MR rows by NV * 16 columns, held in registers over the contraction.
//
// Row m of operand a has word k at a[place[k] + m]: rows are adjacent, so that addresses cost nothing. Operand b lies in
// panels of 16 columns, [word][16]. In a TURNED tile b is the operand that travels as code + 128, and `start` has one
// entry a row; otherwise a is, and `start` has one entry a column.

static const int MOST_ROWS = 24;    // of a tile
static const int WIDEST_TILE = 3;   // panels

typedef void (*Tile)(const uint32_t* a, const int32_t* place, const uint32_t* b, int64_t panel, int64_t words, int32_t* c,
                     int64_t ldc, const int32_t* start);

// c = (ADD ? c : 0) + start + products
#ifdef GB_VNNI
template <int MR, int NV, bool TURNED, bool ADD>
static void tile(const uint32_t* a, const int32_t* place, const uint32_t* b, int64_t panel, int64_t words, int32_t* c,
                 int64_t ldc, const int32_t* start) {
    __m512i sum[MR][NV];
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < NV; v++) {
            sum[m][v] = TURNED ? _mm512_set1_epi32(start[m]) : _mm512_loadu_si512(start + v * 16);
            if (ADD) sum[m][v] = _mm512_add_epi32(sum[m][v], _mm512_loadu_si512(c + m * ldc + v * 16));
        }
    for (int64_t k = 0; k < words; k++, b += 16) {
        const uint32_t* row = a + place[k];
        __m512i column[NV];
        GB_UNROLL for (int v = 0; v < NV; v++) column[v] = _mm512_loadu_si512(b + v * panel);
        GB_UNROLL for (int m = 0; m < MR; m++) {
            __m512i word = _mm512_set1_epi32((int)row[m]);
            GB_UNROLL for (int v = 0; v < NV; v++) {
                if (TURNED)
                    GB_DOT(sum[m][v], column[v], word);
                else
                    GB_DOT(sum[m][v], word, column[v]);
            }
        }
    }
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < NV; v++) _mm512_storeu_si512(c + m * ldc + v * 16, sum[m][v]);
}
static const int WIDEST = WIDEST_TILE;
GB_INLINE constexpr int most_rows(int panels) { return MOST_ROWS / panels; }
#elif defined(__AVX2__)
template <int MR, int NV, bool TURNED, bool ADD>
static void tile(const uint32_t* a, const int32_t* place, const uint32_t* b, int64_t, int64_t words, int32_t* c,
                 int64_t ldc, const int32_t*) {
    __m256i sum[MR][2];
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < 2; v++)
            sum[m][v] = ADD ? _mm256_loadu_si256((__m256i*)(c + m * ldc + v * 8)) : _mm256_setzero_si256();
    for (int64_t k = 0; k < words; k++, b += 16) {
        const uint32_t* row = a + place[k];
        __m256i left = _mm256_loadu_si256((const __m256i*)b), right = _mm256_loadu_si256((const __m256i*)(b + 8));
        GB_UNROLL for (int m = 0; m < MR; m++) {
            __m256i word = _mm256_set1_epi32((int)row[m]);
            sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(word, left));
            sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(word, right));
        }
    }
    GB_UNROLL for (int m = 0; m < MR; m++)
        GB_UNROLL for (int v = 0; v < 2; v++) _mm256_storeu_si256((__m256i*)(c + m * ldc + v * 8), sum[m][v]);
}
static const int WIDEST = 1;
GB_INLINE constexpr int most_rows(int) { return 6; }
#else
template <int MR, int NV, bool TURNED, bool ADD>
static void tile(const uint32_t* a, const int32_t* place, const uint32_t* b, int64_t, int64_t words, int32_t* c,
                 int64_t ldc, const int32_t*) {
    for (int m = 0; m < MR; m++) {
        uint32_t sum[16];  // columns that fill a panel hold anything, and their sums may pass 32 bits
        for (int j = 0; j < 16; j++) sum[j] = ADD ? (uint32_t)c[m * ldc + j] : 0;
        for (int64_t k = 0; k < words; k++) {
            uint32_t word = a[place[k] + m];
            int32_t low = (int16_t)word, high = (int32_t)word >> 16;
            for (int j = 0; j < 16; j++) {
                uint32_t column = b[k * 16 + j];
                sum[j] += (uint32_t)(low * (int16_t)column) + (uint32_t)(high * ((int32_t)column >> 16));
            }
        }
        for (int j = 0; j < 16; j++) c[m * ldc + j] = (int32_t)sum[j];
    }
}
static const int WIDEST = 1;
GB_INLINE constexpr int most_rows(int) { return 4; }
#endif

template <int MR, int NV, bool TURNED, bool ADD>
static Tile tile_for(int rows) {
    if (rows == MR) return tile<MR, NV, TURNED, ADD>;
    if constexpr (MR > 1) return tile_for<MR - 1, NV, TURNED, ADD>(rows);
    return nullptr;
}

template <bool TURNED, bool ADD>
static Tile find_tile(int rows, int panels) {
    if (panels == 1) return tile_for<most_rows(1), 1, TURNED, ADD>(rows);
    if constexpr (WIDEST > 1) {
        if (panels == 2) return tile_for<most_rows(2), 2, TURNED, ADD>(rows);
        return tile_for<most_rows(3), 3, TURNED, ADD>(rows);
    }
    return nullptr;
}

// How many of the panels that are left one tile takes.
GB_INLINE int tile_width(int64_t left) { return WIDEST == 1 || left == 1 ? 1 : left % 3 == 0 ? 3 : 2; }

// What takes off the 128 that the other operand carries: -128 times the sums over the words of n adjacent lines.
static void starts_of(const uint32_t* from, int64_t pitch, int64_t words, int n, int32_t* start) {
    for (int i = 0; i < n; i++) start[i] = 0;
#ifdef GB_VNNI
    for (int i = 0; i < n; i += 16) {
        __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
        for (int64_t k = 0; k < words; k++) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(from + k * pitch + i));
        sum = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7);
        _mm512_mask_storeu_epi32(start + i, n - i < 16 ? (__mmask16)((1u << (n - i)) - 1) : (__mmask16)0xffff, sum);
    }
#else
    (void)from, (void)pitch, (void)words;
#endif
}

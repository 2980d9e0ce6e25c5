// Sums of products by the matrix unit (AMX): tiles of 16 rows by 16 columns, both operands signed.
//
// Step k of row tile i lies at a + i * pitch + place[k] (bytes): 16 lines of 64 codes. Step k of column tile j lies at
// b[j] + k * TILE words: 16 lines of 16 words, a panel of tile.inl. Tiles are always whole: operands are padded.

static const int64_t TILE = 256;  // words of a tile

struct AmxTiles {
    const char* a;
    int64_t pitch, steps;
    const int32_t* place;
    const uint32_t* b[4];
    int32_t* c[4];  // of the column tiles, row tile 0
    int64_t ldc;
};

struct AmxShape {
    uint8_t palette, first, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// static: compilers believe that the instruction reads the first bytes only
alignas(64) static const AmxShape AMX_SHAPE = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

GB_BEGIN("amx-tile,amx-int8")

// Every thread says what its tiles look like, and gives them up again: the system need not save them then.
static void amx_enter() { _tile_loadconfig(&AMX_SHAPE); }

static void amx_leave() { _tile_release(); }

#define GB_A(tile, i) _tile_loadd(tile, t->a + (i) * t->pitch + t->place[k], 64)
#define GB_B(tile, j) _tile_loadd(tile, t->b[j] + k * TILE, 64)
#define GB_START(tile, i, j)                                                 \
    do {                                                                     \
        if constexpr (ADD)                                                   \
            _tile_loadd(tile, t->c[j] + (i) * 16 * t->ldc, (int)t->ldc * 4); \
        else                                                                 \
            _tile_zero(tile);                                                \
    } while (0)
#define GB_END_OF(tile, i, j) _tile_stored(tile, t->c[j] + (i) * 16 * t->ldc, (int)t->ldc * 4)

// c = (ADD ? c : 0) + products, of ROWS by COLUMNS tiles: up to 2 by 2.
template <int ROWS, int COLUMNS, bool ADD>
static void amx_square(const AmxTiles* t) {
    GB_START(0, 0, 0);
    if constexpr (COLUMNS > 1) GB_START(1, 0, 1);
    if constexpr (ROWS > 1) GB_START(2, 1, 0);
    if constexpr (ROWS > 1 && COLUMNS > 1) GB_START(3, 1, 1);
    for (int64_t k = 0; k < t->steps; k++) {
        GB_A(4, 0);
        GB_B(6, 0);
        _tile_dpbssd(0, 4, 6);
        if constexpr (ROWS > 1) {
            GB_A(5, 1);
            _tile_dpbssd(2, 5, 6);
        }
        if constexpr (COLUMNS > 1) {
            GB_B(7, 1);
            _tile_dpbssd(1, 4, 7);
        }
        if constexpr (ROWS > 1 && COLUMNS > 1) _tile_dpbssd(3, 5, 7);
    }
    GB_END_OF(0, 0, 0);
    if constexpr (COLUMNS > 1) GB_END_OF(1, 0, 1);
    if constexpr (ROWS > 1) GB_END_OF(2, 1, 0);
    if constexpr (ROWS > 1 && COLUMNS > 1) GB_END_OF(3, 1, 1);
}

// Four row tiles by one column tile: sums that do not wait for each other, where there is but one column tile.
template <bool ADD>
static void amx_tall(const AmxTiles* t) {
    GB_START(0, 0, 0);
    GB_START(1, 1, 0);
    GB_START(2, 2, 0);
    GB_START(3, 3, 0);
    for (int64_t k = 0; k < t->steps; k++) {
        GB_B(4, 0);
        GB_A(5, 0);
        _tile_dpbssd(0, 5, 4);
        GB_A(6, 1);
        _tile_dpbssd(1, 6, 4);
        GB_A(7, 2);
        _tile_dpbssd(2, 7, 4);
        GB_A(5, 3);
        _tile_dpbssd(3, 5, 4);
    }
    GB_END_OF(0, 0, 0);
    GB_END_OF(1, 1, 0);
    GB_END_OF(2, 2, 0);
    GB_END_OF(3, 3, 0);
}

// One row tile by four column tiles.
template <bool ADD>
static void amx_wide(const AmxTiles* t) {
    GB_START(0, 0, 0);
    GB_START(1, 0, 1);
    GB_START(2, 0, 2);
    GB_START(3, 0, 3);
    for (int64_t k = 0; k < t->steps; k++) {
        GB_A(4, 0);
        GB_B(5, 0);
        _tile_dpbssd(0, 4, 5);
        GB_B(6, 1);
        _tile_dpbssd(1, 4, 6);
        GB_B(7, 2);
        _tile_dpbssd(2, 4, 7);
        GB_B(5, 3);
        _tile_dpbssd(3, 4, 5);
    }
    GB_END_OF(0, 0, 0);
    GB_END_OF(1, 0, 1);
    GB_END_OF(2, 0, 2);
    GB_END_OF(3, 0, 3);
}

#undef GB_A
#undef GB_B
#undef GB_START
#undef GB_END_OF

GB_END

template <bool ADD>
static void amx_run(const AmxTiles* t, int rows, int columns) {
    if (rows == 4) return amx_tall<ADD>(t);
    if (columns == 4) return amx_wide<ADD>(t);
    if (rows == 2) return columns == 2 ? amx_square<2, 2, ADD>(t) : amx_square<2, 1, ADD>(t);
    return columns == 2 ? amx_square<1, 2, ADD>(t) : amx_square<1, 1, ADD>(t);
}

// 16 lines of 16 words, `pitch` words apart, turned: 16 adjacent lines.
GB_INLINE void turn_words(const uint32_t* from, int64_t pitch, Floats* to) {
    Floats line[16];
    for (int i = 0; i < 16; i++) __builtin_memcpy(&line[i], from + i * pitch, 64);
    turn(line, to);
}

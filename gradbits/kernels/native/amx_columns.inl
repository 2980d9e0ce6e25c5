// `grad_weight` by the matrix unit: the gradient is laid out once more, in tiles of 16 channels by 64 positions.

// Words [word][row] to tiles [16 rows][chunk of 16 words]; words from `words` on are zero, so that what the other operand
// has there counts for nothing.
static void lay_tiles(const uint32_t* from, int64_t pitch, int64_t words, int64_t rows, uint32_t* to) {
    uint32_t last[256];
    for (int64_t m = 0; m < rows; m += 16)
        for (int64_t w = 0; w < words; w += 16, to += TILE) {
            const uint32_t* lines = from + w * pitch + m;
            int64_t apart = pitch;
            if (words - w < 16) {
                __builtin_memset(last, 0, sizeof last);
                for (int64_t i = 0; i < words - w; i++) __builtin_memcpy(last + i * 16, lines + i * pitch, 64);
                lines = last, apart = 16;
            }
            turn_words(lines, apart, (Floats*)to);
        }
}

static void amx_multiply_columns(const ColumnsJob* job, ColumnsSpace* s, const Block* k, int64_t rows, int64_t width,
                                 bool add) {
    const Patches f = patches_of(job, k);
    const int64_t panels = parts_of(width, 16), tall = parts_of(rows, 16) * 16, all = job->taps * panels;
    AmxTiles t = {};
    t.steps = parts_of(f.words, 16);
    t.place = s->place;
    t.pitch = t.steps * TILE * 4;
    t.ldc = panels * 16;
    lay_tiles(s->a, odd_lines(rows), f.words, rows, s->tiles);
    for (int64_t i = 0; i < t.steps; i++) s->place[i] = (int32_t)(i * TILE * 4);
    for (int64_t at = 0; at < all;) {
        const int wide = all - at >= 4 && tall == 16 ? 4 : all - at >= 2 ? 2 : 1;
        for (int j = 0; j < wide; j++, at++) {
            const int64_t tap = at / panels, panel = at % panels;
            t.b[j] = s->b + patch_at(job, &f, tap) + panel * f.panel;
            t.c[j] = s->sums + tap * tall * t.ldc + panel * 16;
        }
        for (int64_t m = 0; m < tall;) {
            const int high = tall - m >= 32 ? 2 : 1;
            t.a = (const char*)s->tiles + m / 16 * t.pitch;
            add ? amx_run<true>(&t, high, wide) : amx_run<false>(&t, high, wide);
            m += high * 16;
            for (int j = 0; j < wide; j++) t.c[j] += high * 16 * t.ldc;
        }
    }
}

static const ColumnsWay MATRIX_SUMS = {512, 256, 32, 16, TILE, 1, PLAIN, amx_multiply_columns, amx_enter, amx_leave};

static int amx_columns(const ProductArgs* p) { return columns_by(&MATRIX_SUMS, p); }

// `grad_weight`: sums over positions. Pieces of the gradient and of the patches are woven into words where they are
// needed and multiplied while they are in the cache.

static const int DEPTH = 512;       // positions that are woven at once
static const int MOST_ROWS = 480;   // output channels, and
static const int MOST_COLUMNS = 384;  // taps times channels, of one block of sums

struct ColumnsJob {
    const ProductArgs* p;
    int64_t depth, taps;                           // positions of all samples
    int64_t row_blocks, tap_blocks, channel_blocks, splits;
    int64_t rows_each, taps_each, channels_each, pieces_each;
    int64_t tasks, next;
    int64_t* total;  // [group][row][tap][channel], where several tasks share a sum
    int failed, lock;
};

struct ColumnsSpace {
    uint32_t *a, *b;
    int32_t *sums, *start;
    int8_t* lines;  // G rows of patches
};

static const int LINE = MOST_COLUMNS + 128;

// Weave rows of the gradient: [block of 48][word][48].
static void weave_rows(const ProductArgs* p, const int8_t* g, int rows, int codes, int words, uint32_t* to) {
    const int8_t zeros[16] = {0};
    for (int k = 0; k < words; k++)
        for (int m = 0; m < rows; m += 16) {
            int8_t copy[G][16];
            const int8_t* row[G];
            for (int i = 0; i < G; i++) {
                const int8_t* from = g + (k * G + i) * p->w_tap[0] + m;
                row[i] = k * G + i < codes ? from : zeros;
                if (row[i] == from && rows - m < 16) {
                    for (int j = 0; j < 16; j++) copy[i][j] = j < rows - m ? from[j] : 0;
                    row[i] = copy[i];
                }
            }
            weave16(to + (m / BLOCK_ROWS * words + k) * BLOCK_ROWS + m % BLOCK_ROWS, row, 0);
        }
}

// Weave patches into panels, [panel][word][16]; of positions beyond the last, anything: the gradient has zeros there.
static void weave_patches(const ProductArgs* p, const int8_t* x, int64_t first, const Part* part, int codes, int words,
                          int panels, ColumnsSpace* s) {
    Place place = place_of(p, first);
    for (int k = 0; k < words; k++) {
        const int8_t* line[G];
        for (int i = 0; i < G; i++) {
            line[i] = s->lines + i * LINE;
            if (k * G + i >= codes) continue;
            put_patch(p, x, &place, part, s->lines + i * LINE);
            advance(p, &place);
        }
        for (int n = 0; n < panels; n++) {
            weave16(s->b + (n * words + k) * 16, line, FLIP);
            for (int i = 0; i < G; i++) line[i] += 16;
        }
    }
}

static void starts_of(const uint32_t* a, int rows, int words, int32_t* start) {
    for (int first = 0; first < rows; first += BLOCK_ROWS) {
        const uint32_t* from = a + first * words;
#ifdef GB_VNNI
        __m512i sum[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int k = 0; k < words; k++)
            for (int v = 0; v < 3; v++)
                sum[v] = _mm512_dpbusd_epi32(sum[v], _mm512_set1_epi8(1), _mm512_loadu_si512(from + k * 48 + v * 16));
        for (int v = 0; v < 3; v++)
            _mm512_storeu_si512(start + first + v * 16, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum[v]), 7));
#else
        (void)from;
        __builtin_memset(start + first, 0, sizeof(int32_t) * BLOCK_ROWS);
#endif
    }
}

static void columns_task(ColumnsJob* job, ColumnsSpace* s, int64_t task) {
    const ProductArgs* p = job->p;
    int64_t split = task % job->splits;
    task /= job->splits;
    int64_t row = task % job->row_blocks * job->rows_each;
    task /= job->row_blocks;
    int64_t channel = task % job->channel_blocks * job->channels_each;
    task /= job->channel_blocks;
    int64_t tap = task % job->tap_blocks * job->taps_each;
    int64_t group = task / job->tap_blocks;
    int64_t last_channel = channel + job->channels_each, last_tap = tap + job->taps_each;
    if (last_channel > p->channels) last_channel = p->channels;
    if (last_tap > job->taps) last_tap = job->taps;
    const Part part = part_of(p, tap, last_tap, channel, last_channel);
    int rows = (int)(p->columns - row < job->rows_each ? p->columns - row : job->rows_each);
    int64_t width = last_channel - channel;
    int panels = (int)(((last_tap - tap) * width + 15) / 16);
    int64_t ldc = panels * 16, first = split * job->pieces_each * DEPTH, last = first + job->pieces_each * DEPTH;
    if (last > job->depth) last = job->depth;
    bool add = false;
    for (int64_t k = first; k < last; k += DEPTH, add = true) {
        int codes = (int)(last - k < DEPTH ? last - k : DEPTH), words = (codes + G - 1) / G;
        weave_patches(p, p->x + group * p->x_group, k, &part, codes, words, panels, s);
        weave_rows(p, p->w + group * p->w_group + k * p->w_tap[0] + row, rows, codes, words, s->a);
        starts_of(s->a, rows, words, s->start);
        for (int m = 0; m < rows; m += BLOCK_ROWS) {
            int height = rows - m < BLOCK_ROWS ? rows - m : BLOCK_ROWS;
            block<WOVEN>(s->a + m * words, s->b, words * 16, height, panels, words, s->sums + m * ldc, ldc,
                         s->start + m, add);
        }
    }
    if (!add) __builtin_memset(s->sums, 0, sizeof(int32_t) * rows * ldc);
    if (job->total) hold(&job->lock);
    for (int m = 0; m < rows; m++)
        for (int64_t t = tap; t < last_tap; t++) {
            const int32_t* sums = s->sums + m * ldc + (t - tap) * width;
            if (job->total) {
                int64_t* to = job->total + ((group * p->columns + row + m) * job->taps + t) * p->channels + channel;
                for (int64_t j = 0; j < width; j++) to[j] += sums[j];
            } else {
                finish_span(p, sums, width, group, row + m, t, channel);
            }
        }
    if (job->total) release(&job->lock);
}

static void columns_body(void* data) {
    ColumnsJob* job = (ColumnsJob*)data;
    const int64_t a = MOST_ROWS * (DEPTH / G), panels = MOST_COLUMNS / 16 + 1, b = panels * 16 * (DEPTH / G);
    const int64_t sums = MOST_ROWS * panels * 16;
    char* memory = (char*)__builtin_malloc((size_t)(4 * (a + b + sums + MOST_ROWS) + G * LINE + 64));
    if (!memory) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    ColumnsSpace s;
    s.a = (uint32_t*)memory;
    s.b = s.a + a;
    s.sums = (int32_t*)(s.b + b);
    s.start = s.sums + sums;
    s.lines = (int8_t*)(s.start + MOST_ROWS);
    __builtin_memset(s.lines, 0, G * LINE + 64);
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) columns_task(job, &s, task);
    __builtin_free(memory);
}

static void total_body(void* data) {
    ColumnsJob* job = (ColumnsJob*)data;
    const ProductArgs* p = job->p;
    for (int64_t task; (task = gb_take(&job->next)) < p->groups * p->columns;)
        for (int64_t tap = 0; tap < job->taps; tap++)
            finish_span(p, job->total + (task * job->taps + tap) * p->channels, p->channels, task / p->columns,
                        task % p->columns, tap, 0);
}

// Divide `all` into equal parts of at most `most`, each a multiple of `unit`; returns the size of a part.
static int64_t share(int64_t all, int64_t most, int64_t unit) {
    int64_t parts = (all + most - 1) / most, each = parts ? (all + parts - 1) / parts : 1;
    return (each + unit - 1) / unit * unit;
}

static int columns(const ProductArgs* p) {
    ColumnsJob job = {};
    job.p = p;
    job.depth = p->samples * volume(p->count);
    job.taps = volume(p->taps);
    if (p->groups * p->columns * job.taps * p->channels == 0) return GB_OK;
    job.rows_each = share(p->columns, MOST_ROWS, BLOCK_ROWS);
    job.channels_each = p->channels > MOST_COLUMNS ? share(p->channels, MOST_COLUMNS, 16) : p->channels;
    job.taps_each = p->channels > MOST_COLUMNS ? 1 : share(job.taps, MOST_COLUMNS / p->channels, 1);
    job.row_blocks = (p->columns + job.rows_each - 1) / job.rows_each;
    job.channel_blocks = (p->channels + job.channels_each - 1) / job.channels_each;
    job.tap_blocks = (job.taps + job.taps_each - 1) / job.taps_each;
    int64_t blocks = p->groups * job.row_blocks * job.channel_blocks * job.tap_blocks;
    int64_t pieces = (job.depth + DEPTH - 1) / DEPTH, wanted = p->threads > 1 ? 4 * p->threads : 1;
    job.splits = (wanted + blocks - 1) / blocks;
    if (job.splits > pieces) job.splits = pieces;
    if (job.splits < 1) job.splits = 1;
    job.pieces_each = (pieces + job.splits - 1) / job.splits;
    if (job.pieces_each > SAFE / DEPTH) job.pieces_each = SAFE / DEPTH;
    if (job.pieces_each < 1) job.pieces_each = 1;
    job.splits = pieces ? (pieces + job.pieces_each - 1) / job.pieces_each : 1;
    job.tasks = blocks * job.splits;
    if (job.splits > 1) {
        job.total = (int64_t*)__builtin_calloc((size_t)(p->groups * p->columns * job.taps * p->channels), 8);
        if (!job.total) return GB_NO_MEMORY;
    }
    gb_parallel(job.tasks > 1 ? p->threads : 1, columns_body, &job);
    if (job.total && !job.failed) {
        job.next = 0;
        gb_parallel(p->threads, total_body, &job);
    }
    __builtin_free(job.total);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

// `output` and `grad_input`: w is laid out in panels once, then blocks of rows of patches are multiplied by all of them.

static const int BLOCK_PANELS = 32;  // panels of 16 columns whose sums are held at once

struct RowsJob {
    const ProductArgs* p;
    uint32_t* panels;  // [group][panel][word][16]
    int64_t depth, words, count;  // of the contraction: codes, words; panels of one group
    int64_t rows, row_blocks, column_blocks, tasks, next;
    int64_t stack;  // blocks of rows that one task takes
    int failed;
};

// Lay out one panel; word k of column n holds the codes n of the contraction indices G k and on.
static void lay_panel(const RowsJob* job, int64_t group, int64_t panel) {
    const ProductArgs* p = job->p;
    uint32_t* to = job->panels + (group * job->count + panel) * job->words * 16;
    const int8_t* w = p->w + group * p->w_group + panel * 16 * p->w_column;
    int columns = (int)(p->columns - panel * 16 < 16 ? p->columns - panel * 16 : 16);
    const int8_t zeros[16] = {0};
    const int8_t* row[G];
    int64_t tap[3] = {0, 0, 0}, channel = 0;
    for (int64_t k = 0; k < job->words; k++) {
        for (int g = 0; g < G; g++) {
            if (k * G + g >= job->depth) {
                row[g] = nullptr;
                continue;
            }
            row[g] = w + tap[0] * p->w_tap[0] + tap[1] * p->w_tap[1] + tap[2] * p->w_tap[2] + channel * p->w_channel;
            if (++channel < p->channels) continue;
            channel = 0;
            if (++tap[2] < p->taps[2]) continue;
            tap[2] = 0;
            if (++tap[1] < p->taps[1]) continue;
            tap[1] = 0;
            tap[0]++;
        }
        int8_t copy[G][16];
        const int8_t* ready[G];
        for (int g = 0; g < G; g++) {
            ready[g] = row[g] ? row[g] : zeros;
            if (row[g] && (p->w_column != 1 || columns < 16)) {
                for (int i = 0; i < 16; i++) copy[g][i] = i < columns ? row[g][i * p->w_column] : 0;
                ready[g] = copy[g];
            }
        }
        weave16(to + k * 16, ready, FLIP);
    }
}

static void lay_body(void* data) {
    RowsJob* job = (RowsJob*)data;
    for (int64_t task; (task = gb_take(&job->next)) < job->p->groups * job->count;)
        lay_panel(job, task / job->count, task % job->count);
}

// What takes off the 128 that b carries, for one row of a.
GB_INLINE int32_t start_of(const Code* row, int codes) {
#ifdef GB_VNNI
    __m512i sum = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    int i = 0;
    for (; i + 64 <= codes; i += 64) sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(row + i));
    if (i < codes)
        sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8((1ull << (codes - i)) - 1, row + i));
    return -128 * _mm512_reduce_add_epi32(sum);
#else
    (void)row, (void)codes;
    return 0;
#endif
}

// The work space of one thread: a block of a, one long row, sums.
struct RowsSpace {
    Code* a;
    Code* line;
    int32_t *sums, *start;
    int64_t* wide;
};

static void rows_block(const RowsJob* job, RowsSpace* s, int64_t group, int64_t row, int rows, int64_t panel,
                       int64_t panels) {
    const ProductArgs* p = job->p;
    const int64_t taps = volume(p->taps), pieces = (job->depth + PIECE - 1) / PIECE, ldc = panels * 16;
    const int64_t slot = (int64_t)BLOCK_ROWS * ROOM * G;  // codes of one piece's block
    const int8_t* x = p->x + group * p->x_group;
    const uint32_t* b = job->panels + (group * job->count + panel) * job->words * 16;
    const bool split = job->depth > SAFE;
    if (split) __builtin_memset(s->wide, 0, sizeof(int64_t) * rows * ldc);
    Place place = place_of(p, row);
    if (taps != 1) {  // all pieces of every row at once
        Part all = part_of(p, 0, taps, 0, p->channels);
        for (int m = 0; m < rows; m++, advance(p, &place)) {
            Code* line = pieces > 1 ? s->line : s->a + m * ROOM * G;
            Code* end = put_patch(p, x, &place, &all, line);
            for (int i = 0; i < G; i++) end[i] = 0;
            for (int64_t i = 0; i < pieces && pieces > 1; i++) {
                int64_t left = job->depth + G - i * PIECE;
                __builtin_memcpy(s->a + i * slot + m * ROOM * G, line + i * PIECE,
                                 sizeof(Code) * (left < PIECE ? left : PIECE));
            }
        }
    }
    bool add = false;
    for (int64_t i = 0; i < pieces; i++) {
        int64_t left = job->depth - i * PIECE;
        int codes = (int)(left < PIECE ? left : PIECE), words = (codes + G - 1) / G;
        Code* a = taps == 1 ? s->a : s->a + i * slot;
        if (taps == 1) {
            Part part = part_of(p, 0, 1, i * PIECE, i * PIECE + codes);
            Place at = place;
            for (int m = 0; m < rows; m++, advance(p, &at)) {
                Code* end = put_patch(p, x, &at, &part, a + m * ROOM * G);
                for (int j = 0; j < G; j++) end[j] = 0;
            }
        }
        for (int m = 0; m < rows; m++) s->start[m] = start_of(a + m * ROOM * G, codes);
        block<ROWS>((const uint32_t*)a, b + i * (PIECE / G) * 16, job->words * 16, rows, panels, words, s->sums, ldc,
                    s->start, add);
        add = true;
        if (split && ((i + 1) % (SAFE / PIECE) == 0 || i + 1 == pieces)) {
            for (int64_t j = 0; j < rows * ldc; j++) s->wide[j] += s->sums[j];
            add = false;
        }
    }
    if (pieces == 0) __builtin_memset(s->sums, 0, sizeof(int32_t) * rows * ldc);
    int64_t columns = p->columns - panel * 16 < ldc ? p->columns - panel * 16 : ldc;
    for (int m = 0; m < rows; m++, advance(p, &place)) {
        if (m == 0) place = place_of(p, row);
        int64_t position = position_of(p, &place);
        if (split)
            finish_span(p, s->wide + m * ldc, columns, group, place.sample, position, panel * 16);
        else
            finish_span(p, s->sums + m * ldc, columns, group, place.sample, position, panel * 16);
    }
}

static void rows_body(void* data) {
    RowsJob* job = (RowsJob*)data;
    const int64_t pieces = volume(job->p->taps) == 1 ? 1 : (job->depth + PIECE - 1) / PIECE;
    const int64_t panels = job->count < BLOCK_PANELS ? job->count : BLOCK_PANELS;
    const int64_t a = (pieces + 1) * BLOCK_ROWS * ROOM * 4, line = (job->depth + 64 + G) * (int64_t)sizeof(Code);
    const int64_t sums = panels * 16 * BLOCK_ROWS;
    char* memory = (char*)__builtin_malloc((size_t)(a + line + 64 + sums * 12 + BLOCK_ROWS * 4 + 64));
    if (!memory) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    RowsSpace s;
    s.wide = (int64_t*)memory;
    s.a = (Code*)(s.wide + sums);
    s.sums = (int32_t*)((char*)s.a + a);
    s.start = s.sums + sums;
    s.line = (Code*)(s.start + BLOCK_ROWS);
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t column_block = task % job->column_blocks, rest = task / job->column_blocks;
        int64_t stacks = (job->row_blocks + job->stack - 1) / job->stack;
        int64_t group = rest / stacks, first = rest % stacks * job->stack;
        int64_t panel = column_block * BLOCK_PANELS, left = job->count - panel;
        for (int64_t i = first; i < first + job->stack && i < job->row_blocks; i++) {
            int64_t row = i * BLOCK_ROWS, height = job->rows - row;
            rows_block(job, &s, group, row, (int)(height < BLOCK_ROWS ? height : BLOCK_ROWS), panel,
                       left < BLOCK_PANELS ? left : BLOCK_PANELS);
        }
    }
    __builtin_free(memory);
}

static int rows(const ProductArgs* p) {
    RowsJob job = {};
    job.p = p;
    job.depth = volume(p->taps) * p->channels;
    job.words = (job.depth + G - 1) / G;
    job.count = (p->columns + 15) / 16;
    job.rows = p->samples * volume(p->count);
    job.row_blocks = (job.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    job.column_blocks = (job.count + BLOCK_PANELS - 1) / BLOCK_PANELS;
    if (p->groups * job.rows * p->columns == 0) return GB_OK;
    int64_t work = BLOCK_ROWS * (job.depth + 32) * (p->columns < BLOCK_PANELS * 16 ? p->columns : BLOCK_PANELS * 16);
    job.stack = work < (1 << 20) ? (1 << 20) / work + 1 : 1;
    job.tasks = p->groups * ((job.row_blocks + job.stack - 1) / job.stack) * job.column_blocks;
    job.panels = (uint32_t*)__builtin_malloc((size_t)(p->groups * job.count * job.words * 64 + 64));
    if (!job.panels) return GB_NO_MEMORY;
    gb_parallel(p->groups * job.count * job.depth > 16384 ? p->threads : 1, lay_body, &job);
    job.next = 0;
    gb_parallel(job.tasks > 1 ? p->threads : 1, rows_body, &job);
    __builtin_free(job.panels);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

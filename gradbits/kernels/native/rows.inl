// `output` and `grad_input`: w is laid out in panels once; then the input of a block of positions is laid out and
// multiplied by all of them.

static const int64_t ROOM = 384 << 10;       // bytes of a block's input, so that it stays in the second-level cache
static const int64_t MOST_POSITIONS = 1024;  // of a block

struct RowsJob;
struct RowsSpace;

// How the products are computed: the layout of the input, and what multiplies it.
struct RowsWay {
    int64_t unit;  // a line of a panel is a multiple of so many words
    int64_t rows;  // of a tile
    int64_t sums;  // room for those of a tile, and
    int64_t past;  // for words that it reads behind the last row
    void (*multiply)(const RowsJob*, RowsSpace*, const Block*, int64_t group, int64_t panel, int64_t last);
    void (*enter)();  // what every thread does first, and last
    void (*leave)();
};

struct RowsJob {
    const ProductArgs* p;
    const RowsWay* way;
    Blocks blocks;
    uint32_t* panels;  // [group][panel][tap 1][word of tap 0, tap 2][16]
    int32_t* start;    // [group][panel * 16]
    int64_t channel_words, line_words, words, count;  // words of one tap, of a tap 1, of all; panels of one group
    int64_t copies;                                   // taps that have an input of their own
    int64_t column_parts, panels_each, tasks, next;
    int how, failed;
};

struct RowsSpace {
    uint32_t* a;
    int32_t *place, *sums;
    Where* where;
};

static void lay_body(void* data) {
    RowsJob* job = (RowsJob*)data;
    const ProductArgs* p = job->p;
    for (int64_t task; (task = gb_take(&job->next)) < p->groups * job->count;) {
        int64_t group = task / job->count, panel = task % job->count;
        uint32_t* to = job->panels + task * job->words * 16;
        const int8_t* w = p->w + group * p->w_group + panel * 16 * p->w_column;
        int columns = (int)least(p->columns - panel * 16, 16);
        bool filled = columns == 16 && job->line_words == job->copies * job->channel_words;
        for (int64_t i = 0; !filled && i < job->words * 16; i++) to[i] = 0;
        for (int64_t t1 = 0; t1 < p->taps[1]; t1++)
            for (int64_t t0 = 0; t0 < p->taps[0]; t0++)
                for (int64_t t2 = 0; t2 < p->taps[2]; t2++)
                    weave(w + t0 * p->w_tap[0] + t1 * p->w_tap[1] + t2 * p->w_tap[2], p->w_column, p->w_channel, columns,
                          p->channels, 0, p->channels,
                          to + (t1 * job->line_words + (t0 * p->taps[2] + t2) * job->channel_words) * 16, 16, PLAIN);
        starts_of(job->panels + task * job->words * 16, 16, job->words, 16, job->start + task * 16);
    }
}

// Lay out the input of a block for one tap of axes 0 and 2: [word][plane][slot][sample][position].
static void lay_tap(const RowsJob* job, const Block* k, int64_t group, int64_t t0, int64_t t2, uint32_t* a, int64_t pitch) {
    const ProductArgs* p = job->p;
    const Blocks* b = &job->blocks;
    int64_t first, last, column = columns_of(p, k, t2, &first, &last);
    int64_t i0 = k->at0 * p->stride[0] - p->padding[0] + t0 * p->dilation[0];
    for (int64_t line = 0; line < b->planes * b->slots; line++) {
        int64_t i1 = line_in(p, k, line / b->slots, line % b->slots);
        bool there = inside(i0, p->size[0]) && inside(i1, p->size[1]);
        for (int64_t s = 0; s < k->samples; s++) {
            uint32_t* to = a + (line * k->samples + s) * k->n2;
            int64_t low = there ? first : k->n2, high = there ? last : k->n2;
            for (int64_t w = 0; w < job->channel_words && (low > 0 || high < k->n2); w++) {
                weave_zeros(to + w * pitch, low, FLIP);
                weave_zeros(to + w * pitch + high, k->n2 - high, FLIP);
            }
            if (low >= high) continue;
            const int8_t* x = p->x + group * p->x_group + (k->sample + s) * p->x_sample + i0 * p->x_axis[0] +
                              i1 * p->x_axis[1] + (column + low * p->stride[2]) * p->x_axis[2];
            weave(x, p->stride[2] * p->x_axis[2], p->x_channel, high - low, p->channels, 0, p->channels, to + low, pitch,
                  FLIP);
        }
    }
}

// What a tap sees is what another one sees, `shift` positions further on in lines of n.
static void shift_tap(const uint32_t* from, int64_t shift, int64_t n, int64_t lines, int64_t words, uint32_t* to,
                      int64_t pitch) {
    const int64_t step = shift < 0 ? -shift : shift, gone = least(step, n), all = lines * n;
    for (int64_t w = 0; w < words; w++, from += pitch, to += pitch) {
        if (gone < n)
            __builtin_memcpy(shift < 0 ? to + step : to, shift < 0 ? from : from + step, (size_t)(4 * (all - step)));
        for (int64_t at = shift < 0 ? 0 : n - gone; at < all; at += n)
            for (int64_t i = 0; i < gone; i++) to[at + i] = FLIP;
    }
}

// The tap of axis 2 that sees every position where it is, if lines are laid out whole, else -1.
static int64_t tap_in_place(const ProductArgs* p, const Block* k) {
    const bool whole = p->stride[2] == 1 && k->n2 == p->count[2] && p->count[2] == p->size[2];
    const int64_t tap = p->padding[2] / p->dilation[2];
    const bool exact = tap >= 0 && tap < p->taps[2] && tap * p->dilation[2] == p->padding[2];
    return whole && exact ? tap : -1;
}

// Lay out the input of a block: [tap 0][tap 2][word][plane][slot][sample][position].
static void lay_input(const RowsJob* job, const Block* k, int64_t group, uint32_t* a, int64_t pitch) {
    const ProductArgs* p = job->p;
    const int64_t each = job->channel_words * pitch, lines = job->blocks.planes * job->blocks.slots * k->samples;
    const int64_t middle = tap_in_place(p, k);
    for (int64_t t0 = 0; t0 < p->taps[0]; t0++, a += p->taps[2] * each) {
        if (middle >= 0) lay_tap(job, k, group, t0, middle, a + middle * each, pitch);
        for (int64_t t2 = 0; t2 < p->taps[2]; t2++) {
            if (t2 == middle) continue;
            if (middle < 0)
                lay_tap(job, k, group, t0, t2, a + t2 * each, pitch);
            else
                shift_tap(a + middle * each, (t2 - middle) * p->dilation[2], k->n2, lines, job->channel_words,
                          a + t2 * each, pitch);
        }
    }
}

// Where the positions of a block belong.
static void place_rows(const ProductArgs* p, const Block* k, int64_t group, Where* where) {
    for (int64_t i1 = k->at1; i1 < k->at1 + k->n1; i1++)
        for (int64_t sample = k->sample; sample < k->sample + k->samples; sample++)
            for (int64_t i2 = k->at2; i2 < k->at2 + k->n2; i2++, where++) {
                where->sample = sample;
                where->position = p->first + k->at0 * p->step[0] + i1 * p->step[1] + i2 * p->step[2];
                where->to = group * p->r_group + sample * p->r_sample + where->position * p->r_position;
            }
}

static void multiply_rows(const RowsJob* job, RowsSpace* s, const Block* k, int64_t group, int64_t panel, int64_t last) {
    const ProductArgs* p = job->p;
    const Blocks* b = &job->blocks;
    const int64_t line = k->samples * k->n2, rows = k->n1 * line;
    const int64_t pitch = (b->planes * b->slots * line + 15) / 32 * 32 + 16;  // an odd number of cache lines
    lay_input(job, k, group, s->a, pitch);
    int32_t* place = s->place;
    for (int64_t t1 = 0; t1 < p->taps[1]; t1++)
        for (int64_t w = 0; w < job->line_words; w++) *place++ = (int32_t)(w * pitch + slot_of(p, b, t1) * line);
    while (panel < last) {
        int wide = tile_width(last - panel), most = most_rows(wide);
        const uint32_t* w = job->panels + (group * job->count + panel) * job->words * 16;
        for (int64_t m = 0; m < rows; m += most) {
            int height = (int)least(rows - m, most);
            find_tile<false, false>(height, wide)(s->a + m, s->place, w, job->words * 16, job->words, s->sums, wide * 16,
                                                  job->start + (group * job->count + panel) * 16);
            finish(p, s->sums, wide * 16, height, least(p->columns - panel * 16, wide * 16), s->where + m, group, panel * 16,
                   job->how);
        }
        panel += wide;
    }
}

static void nothing() {}

static const RowsWay VECTORS = {1, MOST_ROWS, MOST_ROWS * 16 * WIDEST, 0, multiply_rows, nothing, nothing};

static void rows_task(const RowsJob* job, RowsSpace* s, int64_t task) {
    const ProductArgs* p = job->p;
    int64_t part = task % job->column_parts, group = task / job->column_parts / job->blocks.all;
    const Block k = block_at(p, &job->blocks, task / job->column_parts % job->blocks.all);
    place_rows(p, &k, group, s->where);
    job->way->multiply(job, s, &k, group, part * job->panels_each, least((part + 1) * job->panels_each, job->count));
}

static int64_t input_bytes(const RowsJob* job, int64_t n1, int64_t n2, int64_t samples) {
    const Blocks* b = &job->blocks;
    return 4 * job->line_words * (b->planes * (n1 + reach(job->p)) * samples * n2 + 32);
}

static void rows_body(void* data) {
    RowsJob* job = (RowsJob*)data;
    const Blocks* b = &job->blocks;
    const int64_t positions = b->n1 * b->n2 * b->samples;
    const int64_t a = input_bytes(job, b->n1, b->n2, b->samples) / 64 * 64 + 64 + 4 * job->way->past;
    char* memory = (char*)__builtin_malloc(
        (size_t)(a + 64 + 4 * job->words + 4 * job->way->sums + (positions + 1) * (int64_t)sizeof(Where)));
    if (!memory) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    RowsSpace s;
    s.a = (uint32_t*)(((uintptr_t)memory + 63) / 64 * 64);
    s.sums = (int32_t*)((char*)s.a + a);
    s.where = (Where*)(s.sums + job->way->sums);
    s.place = (int32_t*)(s.where + positions + 1);
    job->way->enter();
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) rows_task(job, &s, task);
    job->way->leave();
    flush();
    __builtin_free(memory);
}

// Blocks of about eight tiles' rows or more whose input fits, and that leave few rows over for a smaller tile.
static void size_blocks(RowsJob* job) {
    const ProductArgs* p = job->p;
    Blocks* b = &job->blocks;
    const int64_t tall = job->way->rows;
    b->planes = least(p->stride[1], (p->taps[1] - 1) * p->dilation[1] + 1);
    const int64_t word = 4 * job->line_words * b->planes + 1;  // bytes of one position of one line
    b->n1 = least(p->count[1], least(ROOM / (word * p->count[2]) - reach(p), MOST_POSITIONS / p->count[2]));
    if (b->n1 < 1) b->n1 = 1;
    b->n2 = least(ROOM / (word * (b->n1 + reach(p))), MOST_POSITIONS) / tall * tall;
    if (b->n2 < tall) b->n2 = tall;
    b->n2 = least(b->n2, p->count[2]);
    b->samples = 1;
    const int64_t each = b->n1 * b->n2;
    double best = 0;
    for (int64_t n = 1; n <= p->samples && n * each <= MOST_POSITIONS; n++) {
        if (n > 1 && (input_bytes(job, b->n1, b->n2, n) > ROOM || (n - 1) * each >= 8 * tall)) break;
        double used = (double)(n * each) / (double)(parts_of(n * each, tall) * tall);
        if (used >= best) best = used, b->samples = n;
    }
    divide(p, b);
}

static int rows_by(const RowsWay* way, const ProductArgs* p) {
    RowsJob job = {};
    job.p = p;
    job.way = way;
    job.channel_words = parts_of(p->channels, G);
    job.copies = p->taps[0] * p->taps[2];
    job.line_words = parts_of(job.copies * job.channel_words, way->unit) * way->unit;
    job.words = p->taps[1] * job.line_words;
    job.count = parts_of(p->columns, 16);
    job.how = ways(p, p->groups * p->samples * volume(p->count) * p->columns);
    if (p->groups * p->samples * volume(p->count) * p->columns == 0) return GB_OK;
    size_blocks(&job);
    job.panels_each = job.count;
    if (p->groups * job.blocks.all < 2 * p->threads && p->threads > 1)
        job.panels_each = parts_of(job.count, least(job.count, parts_of(2 * p->threads, p->groups * job.blocks.all)));
    job.column_parts = parts_of(job.count, job.panels_each);
    job.tasks = p->groups * job.blocks.all * job.column_parts;
    const int64_t all = p->groups * job.count;
    void* memory = __builtin_malloc((size_t)(all * 64 + all * job.words * 64 + 64));
    if (!memory) return GB_NO_MEMORY;
    job.panels = (uint32_t*)(((uintptr_t)memory + 63) / 64 * 64);
    job.start = (int32_t*)(job.panels + all * job.words * 16);
    gb_parallel(all * job.words > 4096 ? p->threads : 1, lay_body, &job);
    job.next = 0;
    gb_parallel(job.tasks > 1 ? p->threads : 1, rows_body, &job);
    __builtin_free(memory);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

static int rows(const ProductArgs* p) { return rows_by(&VECTORS, p); }

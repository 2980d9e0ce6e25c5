// `grad_weight`: sums over positions. The gradient and the input of a block of positions are laid out and multiplied,
// and the sums of the blocks added up.

static const int64_t MOST_SUMS = 512 << 10;   // that are held at once
static const int64_t FEWEST_WORDS = 128;      // of a block, where more would leave threads without one
static const int64_t NEAR = 64;               // positions, a multiple of G
static const int64_t INT32_TERMS = 131071;    // products of two codes whose sum surely fits in int32

struct ColumnsJob;
struct ColumnsSpace;

// How the products are computed: what lays out a block and multiplies it.
struct ColumnsWay {
    int64_t words;  // of a block
    int64_t most;   // output channels of a task; where there are several tasks,
    int64_t unit;   // a multiple of so many
    int64_t rows;   // sums have a multiple of so many
    int64_t past;   // room for words of `b` that are read behind the last, and
    int64_t tiles;  // for words of `a` that are laid out once more, in units of `rows`
    Flip flip;      // how `b` travels
    void (*multiply)(const ColumnsJob*, ColumnsSpace*, const Block*, int64_t rows, int64_t width, bool add);
    void (*enter)();  // what every thread does first, and last
    void (*leave)();
};

struct ColumnsJob {
    const ProductArgs* p;
    const ColumnsWay* way;
    Blocks blocks;
    int64_t taps, copies, words;                    // taps; those of axes 0 and 2; words of a line
    int64_t rows_each, channels_each;               // output and input channels of a task
    int64_t row_parts, channel_parts, splits, blocks_each;
    int64_t tasks, next;
    int64_t* total;  // [group][row][tap][channel], where several tasks share a sum
    int how, failed, lock;
};

struct ColumnsSpace {
    uint32_t *a, *b, *tiles;
    int32_t *sums, *start, *place;
};

GB_INLINE int64_t odd_lines(int64_t n) { return (n + 15) / 32 * 32 + 16; }  // words: an odd number of cache lines

// Lay out the gradient of a block: [line][sample][word][row].
static void lay_gradient(const ColumnsJob* job, const Block* k, int64_t group, int64_t row, int64_t rows, uint32_t* a,
                         int64_t pitch) {
    const ProductArgs* p = job->p;
    const int8_t* g = p->w + group * p->w_group + row * p->w_column + k->at0 * p->w_tap[0] + k->at2 * p->w_tap[2];
    for (int64_t i1 = k->at1; i1 < k->at1 + k->n1; i1++)
        for (int64_t s = k->sample; s < k->sample + k->samples; s++, a += parts_of(k->n2, G) * pitch)
            weave(g + i1 * p->w_tap[1] + s * p->w_channel, p->w_column, p->w_tap[2], rows, k->n2, 0, k->n2, a, pitch, PLAIN);
}

// Lay out the input of a block: [panel][tap 0][tap 2][plane][slot][sample][word][16].
static void lay_patches(const ColumnsJob* job, const Block* k, int64_t group, int64_t channel, int64_t width, uint32_t* b) {
    const ProductArgs* p = job->p;
    const int64_t lines = job->blocks.planes * job->blocks.slots, words = parts_of(k->n2, G);
    const int64_t each = job->copies * lines * k->samples * words * 16, code = p->stride[2] * p->x_axis[2];
    const int8_t* x = p->x + group * p->x_group + channel * p->x_channel + k->sample * p->x_sample;
    for (int64_t t0 = 0; t0 < p->taps[0]; t0++)
        for (int64_t t2 = 0; t2 < p->taps[2]; t2++) {
            int64_t first, last, column = columns_of(p, k, t2, &first, &last);
            int64_t i0 = k->at0 * p->stride[0] - p->padding[0] + t0 * p->dilation[0];
            for (int64_t line = 0; line < lines; line++) {
                int64_t i1 = line_in(p, k, line / job->blocks.slots, line % job->blocks.slots);
                bool there = inside(i0, p->size[0]) && inside(i1, p->size[1]) && first < last;
                const int8_t* from = x + i0 * p->x_axis[0] + i1 * p->x_axis[1] + column * p->x_axis[2];
                for (int64_t s = 0; s < k->samples; s++, b += words * 16, from += p->x_sample)
                    // a few positions of every panel after the other: lines of the cache are read once
                    for (int64_t c = 0; c < k->n2; c += NEAR)
                        for (int64_t panel = 0; panel < width;) {
                            uint32_t* to = b + panel / 16 * each + c / G * 16;
                            const int8_t* codes = from + panel * p->x_channel + c * code;
                            const int64_t n = least(k->n2 - c, NEAR);
                            if (there && weave_panels(codes, p->x_channel, code, width - panel, n, first - c, last - c, to,
                                                      each, job->way->flip)) {
                                panel += 64;
                                continue;
                            }
                            if (there)
                                weave(codes, p->x_channel, code, least(width - panel, 16), n, first - c, last - c, to, 16,
                                      job->way->flip);
                            else
                                weave_zeros(to, parts_of(n, G) * 16, job->way->flip);
                            panel += 16;
                        }
            }
        }
}

// Words of a line, a copy and a panel of the laid out input, and of all positions of a block.
struct Patches {
    int64_t line, copy, panel, words;
};

GB_INLINE Patches patches_of(const ColumnsJob* job, const Block* k) {
    const Blocks* b = &job->blocks;
    const int64_t words = k->samples * parts_of(k->n2, G), copy = b->planes * b->slots * words * 16;
    return {words * 16, copy, job->copies * copy, k->n1 * words};
}

// Where the first panel of a tap begins.
GB_INLINE int64_t patch_at(const ColumnsJob* job, const Patches* f, int64_t t) {
    const ProductArgs* p = job->p;
    const int64_t t2 = t % p->taps[2], t1 = t / p->taps[2] % p->taps[1], t0 = t / p->taps[2] / p->taps[1];
    return (t0 * p->taps[2] + t2) * f->copy + slot_of(p, &job->blocks, t1) * f->line;
}

static void multiply_columns(const ColumnsJob* job, ColumnsSpace* s, const Block* k, int64_t rows, int64_t width, bool add) {
    const Patches f = patches_of(job, k);
    const int64_t pitch = odd_lines(rows), panels = parts_of(width, 16), ldc = panels * 16;
    starts_of(s->a, pitch, f.words, (int)rows, s->start);
    for (int64_t i = 0; i < f.words; i++) s->place[i] = (int32_t)(i * pitch);
    for (int64_t t = 0; t < job->taps; t++) {
        const uint32_t* from = s->b + patch_at(job, &f, t);
        int32_t* sums = s->sums + t * rows * ldc;
        for (int64_t n = 0; n < panels;) {
            int wide = tile_width(panels - n), most = most_rows(wide);
            for (int64_t m = 0; m < rows; m += most) {
                int height = (int)least(rows - m, most);
                Tile run = add ? find_tile<true, true>(height, wide) : find_tile<true, false>(height, wide);
                run(s->a + m, s->place, from + n * f.panel, f.panel, f.words, sums + m * ldc + n * 16, ldc, s->start + m);
            }
            n += wide;
        }
    }
}

static const ColumnsWay VECTOR_SUMS = {256, 512, MOST_ROWS, 1, 0, 0, FLIP, multiply_columns, nothing, nothing};

static void columns_task(ColumnsJob* job, ColumnsSpace* s, int64_t task) {
    const ProductArgs* p = job->p;
    int64_t split = task % job->splits, rest = task / job->splits;
    int64_t row = rest % job->row_parts * job->rows_each;
    rest /= job->row_parts;
    int64_t channel = rest % job->channel_parts * job->channels_each, group = rest / job->channel_parts;
    int64_t rows = least(p->columns - row, job->rows_each), width = least(p->channels - channel, job->channels_each);
    int64_t ldc = parts_of(width, 16) * 16, first = split * job->blocks_each, pitch = odd_lines(rows);
    int64_t tall = parts_of(rows, job->way->rows) * job->way->rows;
    int64_t last = least(first + job->blocks_each, job->blocks.all);
    for (int64_t i = first; i < last; i++) {
        const Block k = block_at(p, &job->blocks, i);
        lay_gradient(job, &k, group, row, rows, s->a, pitch);
        lay_patches(job, &k, group, channel, width, s->b);
        job->way->multiply(job, s, &k, rows, width, i > first);
    }
    if (first >= last) __builtin_memset(s->sums, 0, sizeof(int32_t) * (size_t)(job->taps * tall * ldc));
    if (job->total) hold(&job->lock);
    for (int64_t t = 0; t < job->taps; t++)
        for (int64_t m = 0; m < rows; m++) {
            const int32_t* sums = s->sums + (t * tall + m) * ldc;
            if (job->total) {
                int64_t* to = job->total + ((group * p->columns + row + m) * job->taps + t) * p->channels + channel;
                for (int64_t j = 0; j < width; j++) to[j] += sums[j];
            } else {
                const Where where = {group * p->r_group + (row + m) * p->r_sample + t * p->r_position, row + m, t};
                finish(p, sums, ldc, 1, width, &where, group, channel, job->how | UNIFORM);
            }
        }
    if (job->total) release(&job->lock);
}

static void columns_body(void* data) {
    ColumnsJob* job = (ColumnsJob*)data;
    const Blocks* b = &job->blocks;
    const int64_t panels = parts_of(job->channels_each, 16), words = b->n1 * b->samples * job->words;
    const int64_t a = words * odd_lines(job->rows_each) + 16, tall = parts_of(job->rows_each, job->way->rows) * job->way->rows;
    const int64_t patches = panels * job->copies * b->planes * b->slots * b->samples * job->words * 16 + job->way->past;
    const int64_t sums = job->taps * tall * panels * 16, tiles = job->way->tiles * tall * parts_of(words, 16) * 16;
    char* memory = (char*)__builtin_malloc((size_t)(4 * (a + patches + sums + tiles + words + job->rows_each + 32)));
    if (!memory) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    ColumnsSpace s;
    s.b = (uint32_t*)(((uintptr_t)memory + 63) / 64 * 64);
    s.tiles = s.b + patches;
    s.sums = (int32_t*)(s.tiles + tiles);
    s.a = (uint32_t*)s.sums + sums;
    s.place = (int32_t*)s.a + a;
    s.start = s.place + words;
    __builtin_memset(s.a, 0, sizeof(uint32_t) * (size_t)a);
    job->way->enter();
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) columns_task(job, &s, task);
    job->way->leave();
    flush();
    __builtin_free(memory);
}

static void total_body(void* data) {
    ColumnsJob* job = (ColumnsJob*)data;
    const ProductArgs* p = job->p;
    for (int64_t task; (task = gb_take(&job->next)) < p->groups * p->columns;)
        for (int64_t t = 0; t < job->taps; t++) {
            int64_t group = task / p->columns, row = task % p->columns;
            const Where where = {group * p->r_group + row * p->r_sample + t * p->r_position, row, t};
            finish(p, job->total + (task * job->taps + t) * p->channels, p->channels, 1, p->channels, &where, group, 0,
                   job->how | UNIFORM);
        }
}

// Divide `all` into equal parts of at most `most`, each a multiple of `unit`; returns the size of a part.
static int64_t share(int64_t all, int64_t most, int64_t unit) {
    int64_t each = parts_of(all, parts_of(all, most));
    return parts_of(each, unit) * unit;
}

static void size_columns(ColumnsJob* job) {
    const ProductArgs* p = job->p;
    Blocks* b = &job->blocks;
    job->rows_each = share(p->columns, job->way->most, p->columns > job->way->most ? job->way->unit : 1);
    int64_t most = MOST_SUMS / (job->rows_each * job->taps) / 16 * 16;
    job->channels_each = p->channels <= most ? p->channels : share(p->channels, most < 16 ? 16 : most, 16);
    job->row_parts = parts_of(p->columns, job->rows_each);
    job->channel_parts = parts_of(p->channels, job->channels_each);
    const int64_t parts = p->groups * job->row_parts * job->channel_parts, wanted = p->threads > 1 ? 4 * p->threads : 1;
    b->n1 = b->n2 = b->samples = b->slots = b->planes = job->words = 1;
    for (int64_t words = job->way->words; p->samples * volume(p->count) > 0; words /= 2) {
        b->n2 = least(p->count[2], words * G);
        job->words = parts_of(b->n2, G);
        b->n1 = least(p->count[1], parts_of(words, job->words));
        b->samples = parts_of(words, job->words * b->n1);
        divide(p, b);
        if (parts * b->all >= p->threads || words <= FEWEST_WORDS) break;
    }
    int64_t safe = INT32_TERMS / (b->n1 * b->n2 * b->samples);  // blocks whose sums fit in int32
    job->splits = least(parts_of(wanted, parts), b->all);
    job->blocks_each = job->splits > 0 ? parts_of(b->all, job->splits) : 1;
    if (job->blocks_each > safe) job->blocks_each = safe;
    job->splits = b->all > 0 ? parts_of(b->all, job->blocks_each) : 1;
    job->tasks = parts * job->splits;
}

static int columns_by(const ColumnsWay* way, const ProductArgs* p) {
    ColumnsJob job = {};
    job.p = p;
    job.way = way;
    job.taps = volume(p->taps);
    job.copies = p->taps[0] * p->taps[2];
    const int64_t sums = p->groups * p->columns * job.taps * p->channels;
    if (sums == 0) return GB_OK;
    job.how = ways(p, sums);
    size_columns(&job);
    if (job.splits > 1) {
        job.total = (int64_t*)__builtin_calloc((size_t)sums + 16, 8);
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

static int columns(const ProductArgs* p) { return columns_by(&VECTOR_SUMS, p); }

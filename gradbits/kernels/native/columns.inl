// `grad_weight`: sums over positions. The gradient and the input of a block of positions are laid out and multiplied,
// and the sums of the blocks added up.

static const int64_t MOST_SUMS = 512 << 10;   // that are held at once
static const int64_t FEWEST_WORDS = 128;      // of a block, where more would leave threads without one
static const int64_t INT32_TERMS = 131071;    // products of two codes whose sum surely fits in int32
// With fewer positions for each sum of an output channel, threads take channels each: laying out the gradient for every
// one of them costs less than adding up the sums of several.
static const int64_t CHEAP_SUMS = 24;
static const int64_t FEWEST_CHANNELS = 64;  // of a task then

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
    const int64_t wanted = p->threads > 1 ? 4 * p->threads : 1, others = p->groups * job->row_parts;
    if (p->samples * volume(p->count) < CHEAP_SUMS * job->taps * p->channels) {
        const int64_t fewer = parts_of(p->channels, parts_of(wanted, others));
        most = share(p->channels, fewer > FEWEST_CHANNELS ? fewer : FEWEST_CHANNELS, 16);
        if (most < job->channels_each) job->channels_each = most;
    }
    job->channel_parts = parts_of(p->channels, job->channels_each);
    const int64_t parts = others * job->channel_parts;
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
    job->splits = parts >= 2 * p->threads ? 1 : least(parts_of(wanted, parts), b->all);
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

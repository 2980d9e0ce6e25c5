// `output` and `grad_input` by the matrix unit: every position has its codes of all taps of axes 0 and 2 side by side, in
// chunks of 64 for the tiles.

static const int AMX_ROWS = 64, AMX_COLUMNS = 64;  // most of what is multiplied at once
static const int64_t AMX_NEAR = 32 << 10;          // bytes of panels that the first-level cache holds

// Words of `codes` codes of adjacent lines to to[i * 16 ...], the last one filled with zeros.
static void lay_words(const int8_t* x, int64_t line, int64_t code, int64_t lines, int codes, uint32_t* to) {
    const int words = (codes + G - 1) / G;
    const __mmask16 some = (__mmask16)((1u << words) - 1);
    if (code == 1) {
        const __mmask64 there = codes == 64 ? ~0ull : (1ull << codes) - 1;
        if (codes == 16)
            for (int64_t i = 0; i < lines; i++)
                _mm_storeu_si128((__m128i*)(to + i * 16), _mm_loadu_si128((const __m128i*)(x + i * line)));
        else
            for (int64_t i = 0; i < lines; i++)
                _mm512_mask_storeu_epi32(to + i * 16, some, _mm512_maskz_loadu_epi8(there, x + i * line));
        return;
    }
    uint32_t woven[256];
    Floats turned[16];
    for (int64_t i = 0; i < lines; i += 16) {
        const int n = (int)least(lines - i, 16);
        for (int j = 0; j < 256; j++) woven[j] = 0;
        weave(x + i * line, line, code, n, codes, 0, codes, woven, 16, PLAIN);
        turn_words(woven, 16, turned);
        for (int j = 0; j < n; j++) _mm512_mask_storeu_epi32(to + (i + j) * 16, some, (__m512i)turned[j]);
    }
}

static void lay_no_words(int64_t lines, int words, uint32_t* to) {
    const __mmask16 some = (__mmask16)((1u << words) - 1);
    for (int64_t i = 0; i < lines; i++) _mm512_mask_storeu_epi32(to + i * 16, some, _mm512_setzero_si512());
}

// All taps of axis 2 of a line; x is where its column 0 lies, null for padding.
static void lay_taps(const RowsJob* job, const Block* k, const int8_t* x, int64_t word, uint32_t* to, int64_t positions) {
    const ProductArgs* p = job->p;
    for (int64_t t2 = 0; t2 < p->taps[2]; t2++, word += job->channel_words) {
        int64_t first, last, column = columns_of(p, k, t2, &first, &last);
        if (!x || first == last) first = last = k->n2;
        const int8_t* from = x ? x + (column + first * p->stride[2]) * p->x_axis[2] : nullptr;
        for (int64_t c = 0; c < p->channels;) {
            const int64_t at = word + c / G;
            const int codes = (int)least(p->channels - c, (TILE / 16 - at % 16) * G), words = (codes + G - 1) / G;
            uint32_t* line = to + at / 16 * positions * 16 + at % 16;
            lay_no_words(first, words, line);
            lay_no_words(k->n2 - last, words, line + last * 16);
            if (first < last)
                lay_words(from + c * p->x_channel, p->stride[2] * p->x_axis[2], p->x_channel, last - first, codes,
                          line + first * 16);
            c += codes;
        }
    }
}

// The same where all taps of a position are adjacent in memory and fit in a chunk: read as one piece, without the taps
// that lie outside the line.
static void lay_pieces(const RowsJob* job, const Block* k, const int8_t* x, uint32_t* to) {
    const ProductArgs* p = job->p;
    const int64_t step = p->stride[2] * p->x_axis[2], codes = p->taps[2] * p->channels;
    int64_t first, last, none, column = columns_of(p, k, 0, &first, &none);
    columns_of(p, k, p->taps[2] - 1, &none, &last);
    if (last < first) last = first;
    x += column * p->x_axis[2];
    if (first < last) lay_words(x + first * step, step, 1, last - first, (int)codes, to + first * 16);
    const __mmask16 some = (__mmask16)((1u << codes / G) - 1);
    for (int64_t i = first == 0 ? last : 0; i < k->n2; i = i + 1 == first ? last : i + 1) {
        const int64_t at = column + i * p->stride[2], end = least(p->taps[2], p->size[2] - at), begin = at < 0 ? -at : 0;
        const __mmask64 there = begin < end ? ~0ull >> (64 - (end - begin) * p->channels) << begin * p->channels : 0;
        _mm512_mask_storeu_epi32(to + i * 16, some, _mm512_maskz_loadu_epi8(there, x + i * step));
    }
}

// Lay out the input of a block: [chunk][plane][slot][sample][position][16 words].
static void lay_chunks(const RowsJob* job, const Block* k, int64_t group, uint32_t* a, int64_t positions) {
    const ProductArgs* p = job->p;
    const Blocks* b = &job->blocks;
    const int64_t codes = p->taps[2] * p->channels;
    const bool adjacent = p->x_channel == 1 && p->channels % G == 0 && p->dilation[2] == 1 && p->x_axis[2] == p->channels;
    const bool pieces = adjacent && p->taps[0] == 1 && codes > 0 && codes <= TILE / 4;
    for (int64_t t0 = 0; t0 < p->taps[0]; t0++)
        for (int64_t line = 0; line < b->planes * b->slots; line++) {
            const int64_t i0 = k->at0 * p->stride[0] - p->padding[0] + t0 * p->dilation[0];
            const int64_t i1 = line_in(p, k, line / b->slots, line % b->slots);
            const bool there = inside(i0, p->size[0]) && inside(i1, p->size[1]);
            for (int64_t s = 0; s < k->samples; s++) {
                const int8_t* x = p->x + group * p->x_group + (k->sample + s) * p->x_sample + i0 * p->x_axis[0] +
                                  i1 * p->x_axis[1];
                uint32_t* to = a + (line * k->samples + s) * k->n2 * 16;
                if (there && pieces)
                    lay_pieces(job, k, x, to);
                else
                    lay_taps(job, k, there ? x : nullptr, t0 * p->taps[2] * job->channel_words, to, positions);
            }
        }
}

static void amx_multiply_rows(const RowsJob* job, RowsSpace* s, const Block* k, int64_t group, int64_t panel,
                              int64_t last) {
    const ProductArgs* p = job->p;
    const Blocks* b = &job->blocks;
    const int64_t line = k->samples * k->n2, rows = k->n1 * line, positions = b->planes * b->slots * line;
    const int64_t chunks = job->line_words / 16;
    lay_chunks(job, k, group, s->a, positions);
    AmxTiles t = {};
    t.steps = p->taps[1] * chunks;
    t.place = s->place;
    t.pitch = TILE * 4;
    for (int64_t t1 = 0; t1 < p->taps[1]; t1++)
        for (int64_t i = 0; i < chunks; i++)
            s->place[t1 * chunks + i] = (int32_t)((i * positions + slot_of(p, b, t1) * line) * 64);
    // two panels stay in the first-level cache: four would not
    const int64_t two = 2 * job->words * 64, most = two <= AMX_NEAR && 2 * two > AMX_NEAR ? 2 : AMX_COLUMNS / 16;
    while (panel < last) {
        const int wide = (int)least(last - panel, most);
        const int64_t width = least(p->columns - panel * 16, wide * 16);
        const uint32_t* w = job->panels + (group * job->count + panel) * job->words * 16;
        t.ldc = wide * 16;
        for (int64_t m = 0; m < rows;) {
            const int64_t left = parts_of(rows - m, 16);
            const int tall = left >= 4 && wide == 1 ? 4 : left >= 2 ? 2 : 1;
            t.a = (const char*)(s->a + m * 16);
            for (int first = 0; first < wide; first += 2) {
                for (int j = 0; j < 2; j++) {
                    t.b[j] = w + (first + j) * job->words * 16;
                    t.c[j] = s->sums + (first + j) * 16;
                }
                amx_run<false>(&t, tall, wide - first == 1 ? 1 : 2);
            }
            for (int i = 0; i < tall; i++, m += 16)
                finish(p, s->sums + i * 16 * t.ldc, t.ldc, (int)least(rows - m, 16), width, s->where + m, group, panel * 16,
                       job->how);
        }
        panel += wide;
    }
}

static const RowsWay MATRICES = {16, 32, AMX_ROWS * AMX_COLUMNS, AMX_ROWS * 16, amx_multiply_rows, amx_enter,
                                 amx_leave};

static int amx_rows(const ProductArgs* p) { return rows_by(&MATRICES, p); }

// `output` and `grad_input` of depthwise convolutions: the taps along the second axis are words of G codes, a column of the
// input is laid out once for all the positions that meet it, and a sum takes one word of every lane at a time.

static const int64_t DEPTH_ROWS = 16;  // positions of a block

// Columns of the input that a block of positions meets. Position m and tap t2 find theirs in slot m * position + t2 * tap.
struct DepthColumns {
    int64_t slots, position, tap;
    bool shared;  // a slot for every column from the first to the last, or one for each position and tap
};

GB_INLINE DepthColumns depth_columns_of(const ProductArgs* p, int64_t rows) {
    const int64_t span = (rows - 1) * p->stride[2] + (p->taps[2] - 1) * p->dilation[2] + 1;
    if (span <= 2 * rows * p->taps[2]) return {span, p->stride[2], p->dilation[2], true};
    return {rows * p->taps[2], 1, rows, false};
}

// Taps of the second axis, from input coordinate `at` on, that lie inside the input.
GB_INLINE void depth_taps(const ProductArgs* p, int64_t at, int64_t* first, int64_t* last) {
    const int64_t step = p->dilation[1];
    *first = at < 0 ? parts_of(-at, step) : 0;
    *last = at >= p->size[1] ? 0 : least(p->taps[1], (p->size[1] - 1 - at) / step + 1);
}

// The words of a column of the input: as `weave` does for adjacent lines, up to 64 of them at once.
GB_INLINE void depth_weave(const int8_t* x, int64_t code, int64_t lines, int64_t codes, int64_t first, int64_t last,
                           uint32_t* to) {
#ifdef GB_VNNI
    const __mmask64 some = lines < 64 ? ((__mmask64)1 << lines) - 1 : ~(__mmask64)0;
    const __m512i turn = _mm512_set1_epi32((int)FLIP);
    for (int64_t k = 0; k < codes; k += G, to += DEPTH_BLOCK) {
        __m512i row[G], w[G];
        GB_UNROLL for (int g = 0; g < G; g++) {
            row[g] = turn;  // code 0
            if (k + g >= first && k + g < last)
                row[g] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, x + (k + g) * code), turn);
        }
        __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpacklo_epi8(row[2], row[3]);
        __m512i c = _mm512_unpackhi_epi8(row[0], row[1]), d = _mm512_unpackhi_epi8(row[2], row[3]);
        w[0] = _mm512_unpacklo_epi16(a, b), w[1] = _mm512_unpackhi_epi16(a, b);
        w[2] = _mm512_unpacklo_epi16(c, d), w[3] = _mm512_unpackhi_epi16(c, d);
        // quarter q of w[i] holds lines 16 q + 4 i to 16 q + 4 i + 3
        a = _mm512_shuffle_i32x4(w[0], w[1], 0x44), b = _mm512_shuffle_i32x4(w[2], w[3], 0x44);
        c = _mm512_shuffle_i32x4(w[0], w[1], 0xee), d = _mm512_shuffle_i32x4(w[2], w[3], 0xee);
        _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(to + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(to + 48, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
#else
    weave(x, 1, code, lines, codes, first, last, to, DEPTH_BLOCK, FLIP);
#endif
}

// Lay out what positions i2 to i2 + rows - 1 of a line meet, n channels from c on: [slot][word][DEPTH_BLOCK].
static void depth_lay(const DepthJob* job, int64_t line, int64_t i2, int64_t rows, const DepthColumns* k, int64_t c,
                      int64_t n, uint32_t* to) {
    const ProductArgs* p = job->p;
    const int64_t i1 = line % p->count[1], i0 = line / p->count[1] % p->count[0], sample = line / p->count[1] / p->count[0];
    const int64_t at0 = i0 * p->stride[0] - p->padding[0], at1 = i1 * p->stride[1] - p->padding[1];
    const int64_t words = parts_of(p->taps[1], G);
    int64_t first, last;
    depth_taps(p, at1, &first, &last);
    const int8_t* x = p->x + sample * p->x_sample + at1 * p->x_axis[1] + c;
    for (int64_t slot = 0; slot < k->slots; slot++) {
        const int64_t step = k->shared ? slot : slot % rows * p->stride[2] + slot / rows * p->dilation[2];
        const int64_t column = i2 * p->stride[2] - p->padding[2] + step;
        for (int64_t t0 = 0; t0 < p->taps[0]; t0++, to += words * DEPTH_BLOCK) {
            const int64_t a0 = at0 + t0 * p->dilation[0];
            if (first < last && inside(a0, p->size[0]) && inside(column, p->size[2]))
                depth_weave(x + a0 * p->x_axis[0] + column * p->x_axis[2], p->dilation[1] * p->x_axis[1], n, p->taps[1],
                            first, last, to);
            else
                weave_zeros(to, words * DEPTH_BLOCK, FLIP);
        }
    }
}

GB_INLINE Words dot(Words sum, const uint32_t* x, const uint32_t* w) {
#ifdef GB_VNNI
    __m512i total = (__m512i)sum;
    GB_DOT(total, _mm512_loadu_si512(x), _mm512_loadu_si512(w));
    return (Words)total;
#else
    Words a, b;
    __builtin_memcpy(&a, x, sizeof a);
    __builtin_memcpy(&b, w, sizeof b);
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Sums of M positions from m on, V * 16 lanes each.
template <int M, int V>
GB_INLINE void depth_sums(const DepthJob* job, const DepthColumns* k, const uint32_t* x, int64_t m, int64_t c, int32_t* sums) {
    Words sum[M][V];
    GB_UNROLL for (int v = 0; v < V; v++)
        GB_UNROLL for (int i = 0; i < M; i++) sum[i][v] = words_at(job->start + c + v * 16);
    const uint32_t* w = job->w + c;
    const int64_t pitch = k->position * job->words * DEPTH_BLOCK;
    for (int64_t t2 = 0; t2 < job->p->taps[2]; t2++) {
        const uint32_t* from = x + (m * k->position + t2 * k->tap) * job->words * DEPTH_BLOCK;
        for (int64_t word = 0; word < job->words; word++, from += DEPTH_BLOCK, w += job->pitch)
            GB_UNROLL for (int v = 0; v < V; v++)
                GB_UNROLL for (int i = 0; i < M; i++) sum[i][v] = dot(sum[i][v], from + i * pitch + v * 16, w + v * 16);
    }
    GB_UNROLL for (int i = 0; i < M; i++)
        GB_UNROLL for (int v = 0; v < V; v++) __builtin_memcpy(sums + (m + i) * DEPTH_BLOCK + v * 16, &sum[i][v], 64);
}

template <int V>
static void depth_block(const DepthJob* job, const DepthColumns* k, const uint32_t* x, int64_t rows, int64_t c, int32_t* sums) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4) depth_sums<4, V>(job, k, x, m, c, sums);
    for (; m < rows; m++) depth_sums<1, V>(job, k, x, m, c, sums);
}

static void depth_rows_body(void* data) {
    DepthJob* job = (DepthJob*)data;
    const ProductArgs* p = job->p;
    const DepthColumns most = depth_columns_of(p, least(p->count[2], DEPTH_ROWS));
    uint32_t* x = (uint32_t*)__builtin_calloc((size_t)(2 * most.slots * job->words * DEPTH_BLOCK), sizeof(uint32_t));
    if (!x) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    alignas(64) int32_t sums[DEPTH_ROWS * DEPTH_BLOCK] = {};
    Where where[DEPTH_ROWS];
    for (int64_t line; (line = gb_take(&job->next)) < job->lines;) {
        const int64_t i1 = line % p->count[1], i0 = line / p->count[1] % p->count[0], sample = line / p->count[1] / p->count[0];
        for (int64_t i2 = 0; i2 < p->count[2]; i2 += DEPTH_ROWS) {
            const int64_t rows = least(p->count[2] - i2, DEPTH_ROWS);
            const DepthColumns k = depth_columns_of(p, rows);
            for (int64_t m = 0; m < rows; m++) {
                const int64_t position = p->first + i0 * p->step[0] + i1 * p->step[1] + (i2 + m) * p->step[2];
                where[m] = {sample * p->r_sample + position * p->r_position, sample, position};
            }
            for (int64_t c = 0; c < p->groups; c += DEPTH_BLOCK) {
                const int64_t n = least(p->groups - c, DEPTH_BLOCK);
                if (p->channels) {  // else every sum is empty
                    depth_lay(job, line, i2, rows, &k, c, n, x);
                    (n > 48 ? depth_block<4> : n > 32 ? depth_block<3> : n > 16 ? depth_block<2> : depth_block<1>)(
                        job, &k, x, rows, c, sums);
                }
                finish(&job->lanes, sums, DEPTH_BLOCK, (int)rows, n, where, 0, c, job->how);
            }
        }
    }
    flush();
    __builtin_free(x);
}

static int depth_rows(const ProductArgs* p) {
    DepthJob job = {};
    depth_lanes(&job, p);
    if (job.lines * p->count[2] * p->groups == 0) return GB_OK;
    job.how = ways(&job.lanes, job.lines * p->count[2] * p->groups);
    const int64_t words = p->taps[2] * job.words;
    job.w = (uint32_t*)__builtin_calloc((size_t)((words + 1) * job.pitch), sizeof(uint32_t));
    if (!job.w) return GB_NO_MEMORY;
    uint32_t* to = job.w;
    for (int64_t t2 = 0; t2 < p->taps[2]; t2++)
        for (int64_t t0 = 0; t0 < p->taps[0]; t0++, to += parts_of(p->taps[1], G) * job.pitch)
            weave(p->w + t0 * p->w_tap[0] + t2 * p->w_tap[2], p->w_group, p->w_tap[1], p->groups, p->taps[1], 0, p->taps[1],
                  to, job.pitch, PLAIN);
    job.start = (int32_t*)to;
    starts_of(job.w, job.pitch, words, (int)job.pitch, job.start);
    gb_parallel(job.lines > 1 ? p->threads : 1, depth_rows_body, &job);
    __builtin_free(job.w);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

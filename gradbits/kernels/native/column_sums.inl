// Sums of the columns of a matrix, as gradbits/kernels/columns.py defines them: the order of a sum is part of the
// definition. Compiled once per instruction set.

static const int64_t SUM_ROWS = 64;  // that are added one after the other

struct ColumnSumsJob {
    const ColumnSumsArgs* p;
    int64_t blocks, each, next;  // blocks of rows; blocks of one task
    int lock;
};

// Add `count` rows to n sums, or let the sums be the first of them.
template <class T, int COUNT, bool START>
GB_INLINE void add_lanes(const T* __restrict x, int64_t pitch, int n, float* __restrict sum, Widest* __restrict w) {
    GB_INDEPENDENT
    for (int j = 0; j < n; j++) {
        float total = START ? 0.0f : sum[j];
        uint32_t wide = w->bits[j];
        GB_UNROLL for (int i = 0; i < COUNT; i++) {
            float v = widen(x[i * pitch + j]);
            total = START && i == 0 ? v : total + v;
            widen_to(&wide, v);
        }
        sum[j] = total;
        w->bits[j] = wide;
    }
}

template <class T, int COUNT, bool START>
GB_INLINE void add_some(const T* x, int64_t pitch, int64_t n, float* sum, Widest* w) {
    int64_t at = 0;
    for (; at + NORM_BLOCK <= n; at += NORM_BLOCK) add_lanes<T, COUNT, START>(x + at, pitch, NORM_BLOCK, sum + at, w);
    if (at < n) add_lanes<T, COUNT, START>(x + at, pitch, (int)(n - at), sum + at, w);
}

// The sums of `rows` rows; several at once mean fewer passes over the sums.
template <class T>
static void add_rows(const T* x, int64_t pitch, int64_t rows, int64_t n, float* sum, Widest* w) {
    add_some<T, 1, true>(x, pitch, n, sum, w);
    int64_t row = 1;
    for (; row + 7 <= rows; row += 7) add_some<T, 7, false>(x + row * pitch, pitch, n, sum, w);
    for (; row < rows; row++) add_some<T, 1, false>(x + row * pitch, pitch, n, sum, w);
}

template <class T>
static void column_sums_body(void* data) {
    ColumnSumsJob* job = (ColumnSumsJob*)data;
    const ColumnSumsArgs* p = job->p;
    Widest w = {};
    for (int64_t first; (first = gb_take(&job->next) * job->each) < job->blocks;)
        for (int64_t block = first; block < least(first + job->each, job->blocks); block++)
            add_rows((const T*)p->x + block * SUM_ROWS * p->columns, p->columns, least(p->rows - block * SUM_ROWS, SUM_ROWS),
                     p->columns, p->room + block * p->columns, &w);
    settle_widest(p->widest, &job->lock, &w);
}

static int column_sums(const ColumnSumsArgs* p) {
    *p->widest = 0.0f;
    ColumnSumsJob job = {p, parts_of(p->rows, SUM_ROWS), parts_of(TASK, SUM_ROWS * p->columns), 0, 0};
    void (*body)(void*) = p->dtype == GB_FLOAT32    ? column_sums_body<float>
                          : p->dtype == GB_BFLOAT16 ? column_sums_body<Bf16>
                                                    : column_sums_body<Fp16>;
    gb_parallel(job.blocks > job.each ? p->threads : 1, body, &job);
    Widest unused;
    for (int64_t count = job.blocks; count > 1; count = parts_of(count, SUM_ROWS))
        for (int64_t block = 0; block < parts_of(count, SUM_ROWS); block++) {
            const float* from = p->room + block * SUM_ROWS * p->columns;
            float* to = p->room + block * p->columns;
            if (block == 0) {  // where it is
                for (int64_t row = 1; row < least(count, SUM_ROWS); row++)
                    for (int64_t j = 0; j < p->columns; j++) to[j] += from[row * p->columns + j];
            } else {
                add_rows(from, p->columns, least(count - block * SUM_ROWS, SUM_ROWS), p->columns, to, &unused);
            }
        }
    return GB_OK;
}

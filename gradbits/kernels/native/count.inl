// How often each symbol occurs.

static const int64_t COUNT_TASK = 1 << 18;  // symbols that one thread takes

typedef uint8_t Bytes __attribute__((vector_size(64)));

// Symbols below LEVELS: one comparison a level serves 64 symbols. Others are not counted.
template <int LEVELS>
static void count_few(const uint8_t* symbols, int64_t n, int64_t* counts) {
    for (int64_t at = 0; at + 64 <= n;) {
        Bytes sums[LEVELS] = {};
        int64_t last = at + 255 * 64 < n - 63 ? at + 255 * 64 : n - 63;  // a lane counts to 255
        for (; at < last; at += 64) {
            Bytes x;
            __builtin_memcpy(&x, symbols + at, 64);
            GB_UNROLL
            for (int level = 0; level < LEVELS; level++) sums[level] -= (Bytes)(x == (uint8_t)level);
        }
        for (int level = 0; level < LEVELS; level++)
            for (int lane = 0; lane < 64; lane++) counts[level] += sums[level][lane];
    }
    for (int64_t at = n / 64 * 64; at < n; at++)
        if (symbols[at] < LEVELS) counts[symbols[at]]++;
}

// Four tables: the same symbol often follows itself, and would wait for its own count.
static void count_many(const uint8_t* symbols, int64_t n, int64_t* counts) {
    uint32_t part[4][256] = {};
    int64_t at = 0;
    for (; at + 4 <= n; at += 4)
        for (int i = 0; i < 4; i++) part[i][symbols[at + i]]++;
    for (; at < n; at++) part[0][symbols[at]]++;
    for (int s = 0; s < 256; s++) counts[s] += (int64_t)part[0][s] + part[1][s] + part[2][s] + part[3][s];
}

struct CountJob {
    const CountArgs* c;
    int64_t next;
};

static void count_body(void* data) {
    CountJob* job = (CountJob*)data;
    const CountArgs* c = job->c;
    int64_t counts[256] = {};
    for (int64_t first; (first = gb_take(&job->next) * COUNT_TASK) < c->count;) {
        int64_t n = c->count - first < COUNT_TASK ? c->count - first : COUNT_TASK;
        if (c->alphabet <= 8)
            count_few<8>(c->symbols + first, n, counts);
        else if (c->alphabet <= 16)
            count_few<16>(c->symbols + first, n, counts);
        else
            count_many(c->symbols + first, n, counts);
    }
    for (int s = 0; s < 256; s++)
        if (counts[s]) __atomic_fetch_add(c->counts + s, counts[s], __ATOMIC_RELAXED);
}

static int count(const CountArgs* c) {
    CountJob job = {c, 0};
    gb_parallel(c->count > COUNT_TASK ? c->threads : 1, count_body, &job);
    return GB_OK;
}

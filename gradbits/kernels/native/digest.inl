// A digest of memory that tells one state of a tensor from another: each lane a polynomial of its words, by pieces.

static const int DIGEST_LANES = 128;
static const int64_t DIGEST_PIECE = 1 << 16;  // words
static const uint32_t DIGEST_FACTOR = 0x9e3779b1u;
static const uint64_t DIGEST_LANE = 0x9e3779b97f4a7c15u, DIGEST_PIECES = 0xd1342543de82ef95u;

static uint64_t digest_piece(const char* from, int64_t bytes) {
    uint32_t lanes[DIGEST_LANES] = {};
    const int64_t row = 4 * DIGEST_LANES;
    int64_t at = 0;
    for (; at + row <= bytes; at += row) {
        uint32_t words[DIGEST_LANES];
        __builtin_memcpy(words, from + at, sizeof words);
        for (int j = 0; j < DIGEST_LANES; j++) lanes[j] = lanes[j] * DIGEST_FACTOR + words[j];
    }
    if (at < bytes) {
        uint32_t words[DIGEST_LANES] = {};
        __builtin_memcpy(words, from + at, (size_t)(bytes - at));
        for (int j = 0; j < DIGEST_LANES; j++) lanes[j] = lanes[j] * DIGEST_FACTOR + words[j];
    }
    uint64_t value = 0;
    for (int j = 0; j < DIGEST_LANES; j++) value = value * DIGEST_LANE + lanes[j];
    return value;
}

struct DigestJob {
    const DigestArgs* d;
    int64_t tasks, next;
};

static void digest_body(void* data) {
    DigestJob* job = (DigestJob*)data;
    const int64_t each = 4 * DIGEST_PIECE;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        const int64_t left = job->d->bytes - task * each;
        job->d->pieces[task] = digest_piece((const char*)job->d->x + task * each, left < each ? left : each);
    }
}

static int digest(const DigestArgs* d) {
    DigestJob job = {d, (d->bytes + 4 * DIGEST_PIECE - 1) / (4 * DIGEST_PIECE), 0};
    gb_parallel(job.tasks > 1 ? d->threads : 1, digest_body, &job);
    uint64_t value = (uint64_t)d->bytes;
    for (int64_t i = 0; i < job.tasks; i++) value = value * DIGEST_PIECES + d->pieces[i];
    *d->digest = value;
    return GB_OK;
}

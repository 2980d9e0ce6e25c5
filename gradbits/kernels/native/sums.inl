// Sums of codes along one axis: what the zero points of the other operand are multiplied with.

struct SumsJob {
    const SumsArgs* p;
    int64_t size, tasks, next;  // of the axis that is divided: elements of one task
};

// Runs: each sum is over adjacent codes.
static void sums_of_runs(void* data) {
    SumsJob* job = (SumsJob*)data;
    const SumsArgs* p = job->p;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t last = (task + 1) * job->size < p->outer ? (task + 1) * job->size : p->outer;
        for (int64_t o = task * job->size; o < last; o++) {
            const int8_t* x = p->x + o * p->count;
            int32_t sum = 0;
            for (int64_t i = 0; i < p->count; i++) sum += x[i];
            p->sums[o] = sum;
        }
    }
}

// Columns: `inner` sums side by side, a strip of them at once.
static void sums_of_columns(void* data) {
    SumsJob* job = (SumsJob*)data;
    const SumsArgs* p = job->p;
    const int64_t strips = (p->inner + BLOCK - 1) / BLOCK;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t outer = task / strips, first = task % strips * BLOCK, left = p->inner - first;
        int n = (int)(left < BLOCK ? left : BLOCK);
        int32_t sums[BLOCK];
        for (int i = 0; i < n; i++) sums[i] = 0;
        const int8_t* x = p->x + outer * p->count * p->inner + first;
        for (int64_t c = 0; c < p->count; c++, x += p->inner)
            for (int i = 0; i < n; i++) sums[i] += x[i];
        __builtin_memcpy(p->sums + outer * p->inner + first, sums, sizeof(int32_t) * (size_t)n);
    }
}

static int sums(const SumsArgs* p) {
    SumsJob job = {p, 1, 0, 0};
    bool runs = p->inner == 1, large = p->outer * p->count * p->inner > TASK;
    if (runs) job.size = p->count < TASK ? TASK / (p->count + 1) + 1 : 1;
    job.tasks = runs ? (p->outer + job.size - 1) / job.size : p->outer * ((p->inner + BLOCK - 1) / BLOCK);
    gb_parallel(large && job.tasks > 1 ? p->threads : 1, runs ? sums_of_runs : sums_of_columns, &job);
    return GB_OK;
}

// The epilogue alone, of one matrix of sums that another library has computed.

static const int64_t FINISH_ROWS = 16;  // that are finished at once

struct FinishJob {
    const FinishArgs* f;
    int64_t each, tasks, next;  // `each`: rows of one task
    int how;
};

static void finish_body(void* data) {
    FinishJob* job = (FinishJob*)data;
    const ProductArgs* p = &job->f->product;
    Where where[FINISH_ROWS];
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        const int64_t last = least((task + 1) * job->each, p->count[2]);
        for (int64_t row = task * job->each; row < last; row += FINISH_ROWS) {
            const int rows = (int)least(last - row, FINISH_ROWS);
            for (int i = 0; i < rows; i++) where[i] = {(row + i) * p->r_position, 0, row + i};
            finish(p, job->f->sums + row * p->columns, p->columns, rows, p->columns, where, 0, 0, job->how);
        }
    }
    flush();
}

static int finish_sums(const FinishArgs* f) {
    const ProductArgs* p = &f->product;
    const int64_t rows = p->count[2];
    if (rows * p->columns == 0) return GB_OK;
    FinishJob job = {f, 0, 0, 0, ways(p, 0)};
    job.each = parts_of(TASK, p->columns * FINISH_ROWS) * FINISH_ROWS;
    job.tasks = parts_of(rows, job.each);
    gb_parallel(job.tasks > 1 ? p->threads : 1, finish_body, &job);
    return GB_OK;
}

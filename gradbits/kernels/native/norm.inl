// Batch norm with the shortcut and the ReLU behind it, forward and backward, each in two passes over memory.

static void norm_pass(NormJob* job, void (*body)(void*)) {
    job->next = 0;
    gb_parallel(job->p->total > TASK && job->tasks > 1 ? job->p->threads : 1, body, job);
}

// Write what the tasks have summed to `totals`, in float64.
static void norm_totals(const NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t i = 0; i < 2 * p->channels; i++) p->totals[i] = 0.0;
    for (int64_t task = 0; task < job->tasks; task++)
        for (int half = 0; half < 2; half++)
            for (int64_t at = 0; at < p->lanes; at += p->channels) {
                const float* from = job->sums + (task * 2 + half) * p->lanes + at;
                double* to = p->totals + half * p->channels;
                for (int64_t c = 0; c < p->channels; c++) to[c] += (double)from[c];
            }
}

// Repeat the first entries, one of each channel, until they fill the lanes.
static void norm_repeat(const NormArgs* p, float* values) {
    for (int64_t j = p->channels; j < p->lanes; j++) values[j] = values[j - p->channels];
}

// Mean and variance from differences to the first value of each channel, against cancellation.
template <class T>
static void norm_moments(NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t c = 0; c < p->channels; c++) job->shift[c] = widen(((const T*)p->x)[c]);
    norm_repeat(p, job->shift);
    norm_pass(job, norm_sums_body<T, false>);
    norm_totals(job);
    const double count = (double)(p->total / p->channels);
    for (int64_t c = 0; c < p->channels; c++) {
        double first = p->totals[c] / count, var = p->totals[p->channels + c] / count - first * first;
        p->mean[c] = (float)((double)job->shift[c] + first);
        p->var[c] = (float)(var < 0.0 ? 0.0 : var);
        p->inverse[c] = 1.0f / __builtin_sqrtf(p->var[c] + p->eps);
    }
}

template <class T>
static void norm_forward(NormJob* job) {
    const NormArgs* p = job->p;
    if (p->of_batch) norm_moments<T>(job);
    for (int64_t c = 0; c < p->channels; c++) {
        job->scale[c] = p->weight ? p->inverse[c] * p->weight[c] : p->inverse[c];
        job->shift[c] = (p->bias ? p->bias[c] : 0.0f) - p->mean[c] * job->scale[c];
    }
    norm_repeat(p, job->scale);
    norm_repeat(p, job->shift);
    norm_pass(job, p->other ? norm_forward_body<T, true> : norm_forward_body<T, false>);
}

// The statistics' own gradients count where they are those of the batch.
template <class T>
static void norm_backward(NormJob* job) {
    const NormArgs* p = job->p;
    for (int64_t c = 0; c < p->channels; c++) job->shift[c] = p->mean[c];
    norm_repeat(p, job->shift);
    norm_pass(job, norm_sums_body<T, true>);
    norm_totals(job);
    const double count = (double)(p->total / p->channels);
    for (int64_t c = 0; c < p->channels; c++) {
        double inverse = (double)p->inverse[c], second = p->totals[p->channels + c];
        job->scale[c] = p->weight ? p->inverse[c] * p->weight[c] : p->inverse[c];
        job->offset[c] = p->of_batch ? (float)(p->totals[c] / count) : 0.0f;
        job->slope[c] = p->of_batch ? (float)(second / count * inverse * inverse) : 0.0f;
        p->totals[p->channels + c] = second * inverse;
    }
    norm_repeat(p, job->scale);
    norm_repeat(p, job->offset);
    norm_repeat(p, job->slope);
    norm_pass(job, p->rest ? norm_backward_body<T, true> : norm_backward_body<T, false>);
}

static int norm(const NormArgs* p) {
    *p->widest = 0.0f;
    NormJob job = {p, (rows_of(p) + p->size - 1) / p->size, 0, nullptr, nullptr, nullptr, nullptr, nullptr, streams(p), 0};
    job.scale = p->room, job.shift = job.scale + p->lanes, job.offset = job.shift + p->lanes;
    job.slope = job.offset + p->lanes, job.sums = job.slope + p->lanes;
    if (p->backward)
        p->dtype == GB_FLOAT32 ? norm_backward<float>(&job) : norm_backward<Bf16>(&job);
    else
        p->dtype == GB_FLOAT32 ? norm_forward<float>(&job) : norm_forward<Bf16>(&job);
    if (p->dtype == GB_BFLOAT16) round_widest(p->widest);
    return GB_OK;
}

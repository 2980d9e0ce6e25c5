// Minimum and maximum per group; a NaN anywhere in a group makes both NaN, as torch.aminmax does.

static const int LANES = 64;

// Lanes of running extremes; `odd` counts NaN, which comparisons pass over.
struct Extremes {
    float low[LANES], high[LANES];
    int32_t odd[LANES];
};

GB_INLINE void clear(Extremes* e) {
    for (int j = 0; j < LANES; j++) e->low[j] = __builtin_inff(), e->high[j] = -__builtin_inff(), e->odd[j] = 0;
}

GB_INLINE void see(float* low, float* high, int32_t* odd, float v) {
    *low = v < *low ? v : *low;
    *high = v > *high ? v : *high;
    *odd |= v != v;
}

template <class T>
GB_INLINE void scan(Extremes* e, const T* x, int64_t n) {
    Extremes s = *e;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) see(&s.low[j], &s.high[j], &s.odd[j], widen(x[i + j]));
    for (int j = 0; i < n; i++, j++) see(&s.low[j], &s.high[j], &s.odd[j], widen(x[i]));
    *e = s;
}

GB_INLINE void merge(float* low, float* high, float l, float h) {
    // a NaN, once there, stays: no comparison with it holds
    if (!(l >= *low)) *low = *low != *low ? *low : l;
    if (!(h <= *high)) *high = *high != *high ? *high : h;
}

GB_INLINE void settle(const Extremes* e, float* low, float* high) {
    for (int j = 0; j < LANES; j++) {
        float nan = __builtin_nanf("");
        merge(low, high, e->odd[j] ? nan : e->low[j], e->odd[j] ? nan : e->high[j]);
    }
}

struct RangeJob {
    const RangeArgs* q;
    int64_t tasks, size, next;
    int lock;
};

GB_INLINE void hold(int* lock) {
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE)) {
    }
}
GB_INLINE void release(int* lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

// One group: tasks are pieces of it.
template <class T>
static void range_of_one(void* data) {
    RangeJob* job = (RangeJob*)data;
    const RangeArgs* q = job->q;
    int64_t total = q->outer * q->inner;
    Extremes e;
    clear(&e);
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t first = task * job->size, left = total - first;
        scan(&e, (const T*)q->x + first, left < job->size ? left : job->size);
    }
    hold(&job->lock);
    settle(&e, q->low, q->high);
    release(&job->lock);
}

// Groups with long runs: tasks are groups.
template <class T>
static void range_of_runs(void* data) {
    RangeJob* job = (RangeJob*)data;
    const RangeArgs* q = job->q;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t first = task * job->size, last = first + job->size < q->count ? first + job->size : q->count;
        for (int64_t c = first; c < last; c++) {
            Extremes e;
            clear(&e);
            for (int64_t o = 0; o < q->outer; o++) scan(&e, (const T*)q->x + (o * q->count + c) * q->inner, q->inner);
            settle(&e, q->low + c, q->high + c);
        }
    }
}

// Groups that alternate from element to element (channels last): tasks are blocks of LANES groups.
template <class T>
static void range_of_columns(void* data) {
    RangeJob* job = (RangeJob*)data;
    const RangeArgs* q = job->q;
    for (int64_t task; (task = gb_take(&job->next)) < job->tasks;) {
        int64_t first = task * LANES;
        int width = (int)(q->count - first < LANES ? q->count - first : LANES);
        Extremes e;
        clear(&e);
        const T* x = (const T*)q->x + first;
        if (width == LANES) {
            for (int64_t o = 0; o < q->outer; o++, x += q->count)
                for (int j = 0; j < LANES; j++) see(&e.low[j], &e.high[j], &e.odd[j], widen(x[j]));
        } else {
            for (int64_t o = 0; o < q->outer; o++, x += q->count)
                for (int j = 0; j < width; j++) see(&e.low[j], &e.high[j], &e.odd[j], widen(x[j]));
        }
        for (int j = 0; j < width; j++) {
            float nan = __builtin_nanf("");
            q->low[first + j] = e.odd[j] ? nan : e.low[j];
            q->high[first + j] = e.odd[j] ? nan : e.high[j];
        }
    }
}

template <class T>
static int range_for(const RangeArgs* q) {
    int64_t total = q->outer * q->count * q->inner;
    for (int64_t c = 0; c < q->count; c++) q->low[c] = __builtin_inff(), q->high[c] = -__builtin_inff();
    RangeJob job = {q, 0, TASK, 0, 0};
    void (*body)(void*);
    if (q->count == 1) {
        body = range_of_one<T>;
        job.tasks = (total + TASK - 1) / TASK;
    } else if (q->inner == 1) {
        body = range_of_columns<T>;
        job.tasks = (q->count + LANES - 1) / LANES;
    } else {
        body = range_of_runs<T>;
        int64_t each = q->outer * q->inner;
        job.size = each < TASK ? TASK / each : 1;
        job.tasks = (q->count + job.size - 1) / job.size;
    }
    gb_parallel(total > TASK && job.tasks > 1 ? q->threads : 1, body, &job);
    return GB_OK;
}

static int range(const RangeArgs* q) {
    if (q->dtype == GB_FLOAT32) return range_for<float>(q);
    return q->dtype == GB_BFLOAT16 ? range_for<Bf16>(q) : range_for<Fp16>(q);
}

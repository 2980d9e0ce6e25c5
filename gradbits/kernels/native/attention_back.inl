// Attention in 8 bits: the backward pass, and who does what.

typedef float __attribute__((may_alias)) Float;  // floats where sums were

// to += sums of products with codes, or with all digits of probabilities, times a scale.
template <int COUNT>
static void add_sums(const HeadSpace* s, int64_t n, float scale, float* __restrict to) {
    const int32_t* from[COUNT];
    for (int d = 0; d < COUNT; d++) from[d] = s->sums[d];
    GB_INDEPENDENT
    for (int64_t i = 0; i < n; i++) to[i] += joined<COUNT>(from, i) * scale;
}

// What a block of queries shares in its backward pass.
struct Slope {
    int32_t top[LINE];
    int64_t sum[LINE], least;
    float mean[LINE], factor[LINE], even[LINE];  // of dP; s_g s_v / l; min l / l
    float scale, inverse;                        // of the codes of dS
};

// Probabilities, in the place of scores, and from them what their queries share.
static void means_of(const AttentionArgs* p, const HeadSpace* s, int64_t head, int64_t first, int64_t rows, int64_t keys,
                     float size, Slope* b) {
    const float steep = steepness(p, head);
    int64_t all[LINE] = {0};
    for (int64_t j = 0; j < keys; j++) {
        int32_t *line = s->scores + j * LINE, found[LINE];
        const int32_t* __restrict x = s->x + j * LINE;
        if (p->causal && j > first)
            probabilities<true>(line, b->top, steep, j - first, found);
        else
            probabilities<false>(line, b->top, steep, 0, found);
        for (int i = 0; i < LINE; i++) all[i] += (int64_t)found[i] * x[i], line[i] = found[i];
    }
    b->least = b->sum[0];
    for (int64_t i = 1; i < rows; i++) b->least = b->sum[i] < b->least ? b->sum[i] : b->least;
    for (int i = 0; i < LINE; i++) {
        const float sum = (float)b->sum[i];
        b->mean[i] = (float)all[i] / sum;
        b->factor[i] = i < rows ? size / sum : 0.0f;
        b->even[i] = i < rows ? (float)b->least / sum : 0.0f;
    }
}

// dS, in the place of dP, and the scale of its codes.
static void slopes_of(const HeadSpace* s, int64_t rows, int64_t keys, Slope* b) {
    Widest w = {};
    for (int64_t j = 0; j < keys; j++) {
        const int32_t* __restrict p = s->scores + j * LINE;
        const int32_t* x = s->x + j * LINE;
        Float* to = (Float*)s->x + j * LINE;
        GB_INDEPENDENT
        for (int i = 0; i < LINE; i++) {
            const float slope = ((float)p[i] * ((float)x[i] - b->mean[i])) * b->factor[i];
            to[i] = slope;
            widen_to(w.bits + i, slope);
        }
    }
    uint32_t all = 0;
    for (int i = 0; i < (int)rows; i++) all = w.bits[i] > all ? w.bits[i] : all;
    b->scale = scale_for(all, &b->inverse);
}

// Codes of dS, and the digits of probabilities that share one scale.
static void codes_of_slopes(const AttentionArgs* p, const HeadSpace* s, int64_t head, int64_t first, int64_t keys,
                            const Slope* b) {
    uint32_t words[LINE / 2 + 1];
    for (int64_t j = 0; j < keys; j++) {
        const int64_t element = (head * p->keys + j) * p->queries + first;
        const HalfWord* bits = noise_bits(words, element, LINE, p->slope_noise[0], p->slope_noise[1]);
        const Float* slope = (const Float*)s->x + j * LINE;
        const int32_t* __restrict probability = s->scores + j * LINE;
        int8_t* __restrict codes = s->slopes + j * LINE;
        int32_t found[LINE];
        GB_INDEPENDENT
        for (int i = 0; i < LINE; i++) {
            float t = __builtin_rintf(slope[i] * b->inverse + ((float)bits[i] + 0.5f) * 0x1p-16f);
            t = t > -127.0f ? t : -127.0f;
            t = t < 127.0f ? t : 127.0f;
            codes[i] = (int8_t)(int32_t)t;
            found[i] = (int32_t)__builtin_rintf((float)probability[i] * b->even[i]);
        }
        digits_of(found, s, j);
    }
}

// Operand a of what is summed over a block's queries: [query word][key].
static const uint32_t* lay_queries(const HeadSpace* s, const int8_t* x, int64_t rows, int64_t keys) {
    weave(x, LINE, 1, keys, rows, 0, rows, s->words, keys, FLIP);
    return s->words;
}

template <class T>
static void back_block(const AttentionArgs* p, HeadSpace* s, int64_t head, int64_t first) {
    const int64_t rows = least(p->queries - first, LINE), keys = seen_by(p, first + rows), all = p->heads * p->batch;
    const int64_t line = head * p->queries + first;
    const float *scales = p->scales + head, key_scale = scales[all], value_scale = scales[2 * all];
    const int8_t* query = p->query_codes + line * p->width;
    const T* g = head_of<const T>(&p->gradient, p, head) + first * p->gradient.row;
    const float size = codes_of_rows<T, GB_KEYED>(g, p->gradient.row, rows, p->value_width, s->codes,
                                                  line * p->value_width, p->gradient_noise);
    lay_panels(&s->query, query, rows, p->width, p->width, 1);
    lay_panels(&s->gradient, s->codes, rows, p->value_width, p->value_width, 1);
    lay_panels(&s->query_turned, query, p->width, 1, rows, p->width);
    lay_panels(&s->gradient_turned, s->codes, p->value_width, 1, rows, p->value_width);
    multiply_panels(s->key_words, p->keys, keys, &s->query, s->query.words, s->place, s->scores);
    multiply_panels(s->value_words, p->keys, keys, &s->gradient, s->gradient.words, s->place, s->x);
    Slope b;
    for (int i = 0; i < LINE; i++) b.top[i] = i < rows ? p->tops[line + i] : 0, b.sum[i] = i < rows ? p->sums[line + i] : 1;
    means_of(p, s, head, first, rows, keys, size * value_scale, &b);
    slopes_of(s, rows, keys, &b);
    codes_of_slopes(p, s, head, first, keys, &b);

    const int64_t channels = s->key.panels * 16, value_channels = s->value.panels * 16;
    multiply_panels(lay_lines(s, s->slopes, keys), LINE, rows, &s->key, parts_of(keys, G), s->place, s->sums[0]);
    T* grad_query = head_of<T>(&p->grad_query, p, head);
    for (int64_t i = 0; i < rows; i++)
        store_row<1>(s, i * channels, p->width, b.scale * key_scale * p->scale, grad_query + (first + i) * p->grad_query.row);
    multiply_panels(lay_queries(s, s->slopes, rows, keys), keys, keys, &s->query_turned, s->query_turned.words, s->place,
                    s->sums[0]);
    add_sums<1>(s, keys * channels, b.scale * scales[0] * p->scale, s->grad_key);
    for (int d = 0; d < DIGITS; d++)
        multiply_panels(lay_queries(s, s->digits[d], rows, keys), keys, keys, &s->gradient_turned, s->gradient_turned.words,
                        s->place, s->sums[d]);
    const float poison = value_scale != value_scale ? value_scale : size;
    add_sums<DIGITS>(s, keys * value_channels, poison / (float)b.least, s->grad_value);
}

template <class T>
static void store_rows(const float* from, int64_t pitch, int64_t rows, int64_t n, T* to, int64_t row) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t at = 0; at < n; at += NORM_BLOCK)
            narrow_lanes(from + i * pitch + at, (int)least(n - at, NORM_BLOCK), to + i * row + at);
}

template <class T>
static void back_head(const AttentionArgs* p, HeadSpace* s, int64_t head) {
    const int8_t* key = p->key_codes + head * p->keys * p->width;
    const int8_t* value = p->value_codes + head * p->keys * p->value_width;
    const int64_t channels = s->key.panels * 16, value_channels = s->value.panels * 16;
    weave(key, p->width, 1, p->keys, p->width, 0, p->width, s->key_words, p->keys, FLIP);
    weave(value, p->value_width, 1, p->keys, p->value_width, 0, p->value_width, s->value_words, p->keys, FLIP);
    lay_panels(&s->key, key, p->width, 1, p->keys, p->width);
    for (int64_t i = 0; i < p->keys * channels; i++) s->grad_key[i] = 0.0f;
    for (int64_t i = 0; i < p->keys * value_channels; i++) s->grad_value[i] = 0.0f;
    for (int64_t first = 0; first < p->queries; first += LINE) back_block<T>(p, s, head, first);
    store_rows(s->grad_key, channels, p->keys, p->width, head_of<T>(&p->grad_key, p, head), p->grad_key.row);
    store_rows(s->grad_value, value_channels, p->keys, p->value_width, head_of<T>(&p->grad_value, p, head),
               p->grad_value.row);
}

// Room in one piece of memory, of which `at` bytes are given away.
struct Room {
    char* memory;
    size_t at;
};

template <class X>
GB_INLINE void take_room(Room* r, X** to, int64_t n) {
    *to = (X*)(r->memory + r->at);
    r->at += ((size_t)n * sizeof(X) + 127) / 64 * 64;
}

GB_INLINE void take_panels(Room* r, Panels* b, int64_t columns, int64_t terms) {
    b->panels = panels_for(columns);
    take_room(r, &b->at, b->panels * 16 * parts_of(terms, G));
    take_room(r, &b->start, b->panels * 16);
}

static size_t divide_room(const AttentionArgs* p, HeadSpace* s, char* memory) {
    Room r = {memory, 0};
    const int64_t keys = p->keys, wide = 16 * (panels_for(p->width) + panels_for(p->value_width));
    const int64_t rows = keys > LINE ? keys : LINE, most = parts_of(keys + p->width + p->value_width + LINE, G);
    take_panels(&r, &s->query, LINE, p->width);
    take_panels(&r, &s->gradient, LINE, p->value_width);
    take_panels(&r, &s->query_turned, p->width, LINE);
    take_panels(&r, &s->gradient_turned, p->value_width, LINE);
    take_panels(&r, &s->key, p->width, keys);
    take_panels(&r, &s->value, p->value_width, keys);
    take_room(&r, &s->key_words, keys * parts_of(p->width, G));
    take_room(&r, &s->value_words, keys * parts_of(p->value_width, G));
    take_room(&r, &s->words, parts_of(rows, G) * LINE + parts_of(LINE, G) * rows);
    take_room(&r, &s->scores, keys * LINE);
    take_room(&r, &s->x, keys * LINE);
    for (int d = 0; d < DIGITS; d++) take_room(&r, &s->sums[d], rows * wide), take_room(&r, &s->digits[d], keys * LINE);
    take_room(&r, &s->slopes, keys * LINE);
    take_room(&r, &s->codes, LINE * p->value_width);
    take_room(&r, &s->grad_key, keys * wide);
    take_room(&r, &s->grad_value, keys * wide);
    take_room(&r, &s->place, most);
    return r.at;
}

template <class T>
static void attention_body(void* data) {
    AttentionJob* job = (AttentionJob*)data;
    const AttentionArgs* p = job->p;
    HeadSpace s;
    char* memory = (char*)__builtin_calloc(divide_room(p, &s, nullptr) + 64, 1);
    if (!memory) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    divide_room(p, &s, (char*)(((uintptr_t)memory + 63) / 64 * 64));
    for (int64_t head; (head = gb_take(&job->next)) < p->batch * p->heads;)
        p->gradient.at ? back_head<T>(p, &s, head) : attend_head<T>(p, &s, head);
    __builtin_free(memory);
}

static int attention(const AttentionArgs* p) {
    AttentionJob job = {p, 0, 0};
    gb_parallel(p->batch * p->heads > 1 ? p->threads : 1, p->dtype == GB_FLOAT32 ? attention_body<float> : attention_body<Bf16>,
                &job);
    return job.failed ? GB_NO_MEMORY : GB_OK;
}

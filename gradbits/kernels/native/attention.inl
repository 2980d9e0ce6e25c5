// Attention in 8 bits, as gradbits/kernels/attention.py says: what both passes share, and the forward pass.
//
// A thread takes a head, and 32 of its queries at a time, which lie in the lanes: scores are [key][query]. Products are
// those of tile.inl; operand a travels as code + 128, operand b lies in panels of 16 columns.

enum { LINE = 32, DIGITS = 3, DIGIT = 7, TOP = (1 << 21) - 1, NOTHING = 23 };  // queries of a block; see attention.py

// Operand b of a product: `panels` panels of `words` words, and what takes off the 128 of operand a.
struct Panels {
    uint32_t* at;
    int32_t* start;
    int64_t words, panels;
};

// A thread's room.
struct HeadSpace {
    Panels query, gradient;                // [channel word][16 queries]
    Panels query_turned, gradient_turned;  // [query word][16 channels]
    Panels key, value;                     // [key word][16 channels]
    uint32_t *key_words, *value_words;     // operands a: [channel word][key]
    uint32_t* words;                       // operand a of a block
    int32_t *scores, *x;                   // [key][query]
    int32_t* sums[DIGITS];                 // what products give
    int8_t *digits[DIGITS], *slopes, *codes;  // [key][query], the highest first; the gradient's, [query][channel]
    float *grad_key, *grad_value;                     // [key][channel]
    int32_t* place;
};

struct AttentionJob {
    const AttentionArgs* p;
    int64_t next;
    int failed;
};

GB_INLINE int64_t panels_for(int64_t columns) { return parts_of(columns, 16); }

// Lay out b: `terms` codes, `apart` from each other, of each of `columns` columns, `pitch` from each other. Columns that
// fill its last panels hold anything.
static void lay_panels(Panels* b, const int8_t* x, int64_t columns, int64_t pitch, int64_t terms, int64_t apart) {
    b->words = parts_of(terms, G);
    for (int64_t v = 0; v < b->panels; v++) {
        uint32_t* to = b->at + v * b->words * 16;
        const int64_t some = least(columns - v * 16, 16);
        if (some > 0) weave(x + v * 16 * pitch, pitch, apart, some, terms, 0, terms, to, 16, PLAIN);
        starts_of(to, 16, b->words, 16, b->start + v * 16);
    }
}

// c [rows][16 * panels] = the products of rows of a, whose words are `pitch` apart, with b, over its first `words` words.
static void multiply_panels(const uint32_t* a, int64_t pitch, int64_t rows, const Panels* b, int64_t words, int32_t* place,
                            int32_t* c) {
    int32_t some[16 * WIDEST_TILE];
    const int64_t ldc = b->panels * 16, panel = b->words * 16;
    for (int64_t k = 0; k < words; k++) place[k] = (int32_t)(k * pitch);
    for (int64_t v = 0; v < b->panels;) {
        const int wide = tile_width(b->panels - v), tall = most_rows(wide);
        const uint32_t* from = b->at + v * panel;
        const int32_t* start = b->start + v * 16;
        if (words < b->words) {
            for (int i = 0; i < wide; i++) starts_of(from + i * panel, 16, words, 16, some + i * 16);
            start = some;
        }
        const Tile full = find_tile<false, false>(tall, wide);
        for (int64_t m = 0; m < rows; m += tall) {
            const Tile tile = rows - m >= tall ? full : find_tile<false, false>((int)(rows - m), wide);
            tile(a + m, place, from, panel, words, c + m * ldc + v * 16, ldc, start);
        }
        v += wide;
    }
}

// The bits of the largest magnitude of `rows` rows; NaN is above all.
template <class T>
static uint32_t widest_of(const T* x, int64_t pitch, int64_t rows, int64_t width) {
    Widest w = {};
    for (int64_t r = 0; r < rows; r++, x += pitch) {
        int64_t i = 0;
        for (; i + 64 <= width; i += 64)
            for (int j = 0; j < 64; j++) widen_to(w.bits + j, widen(x[i + j]));
        for (int j = 0; i < width; i++, j++) widen_to(w.bits + j, widen(x[i]));
    }
    uint32_t all = 0;
    for (int j = 0; j < 64; j++) all = w.bits[j] > all ? w.bits[j] : all;
    return all;
}

// The scale of values whose largest magnitude has these bits, and its inverse.
GB_INLINE float scale_for(uint32_t bits, float* inverse) {
    const float scale = bits < 0x7f800000u ? as_float(bits) / 127.0f : __builtin_nanf("");
    *inverse = scale >= 0x1p-126f ? 1.0f / scale : 0.0f;
    return scale;
}

// Rows of values to codes, [rows][width]; KEYED: with the noise of elements from `first` on. Returns the scale.
template <class T, int MODE>
static float codes_of_rows(const T* x, int64_t pitch, int64_t rows, int64_t width, int8_t* codes, int64_t first,
                           const int32_t* key) {
    uint32_t words[BLOCK / 2 + 1];
    float inverse;
    const float scale = scale_for(widest_of(x, pitch, rows, width), &inverse);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < width; i += BLOCK) {
            const int n = (int)least(width - i, BLOCK);
            const HalfWord* bits = MODE == GB_KEYED ? noise_bits(words, first + r * width + i, n, key[0], key[1]) : nullptr;
            codes_of<T, MODE, false, false, false>(x + r * pitch + i, codes + r * width + i, n, &inverse, nullptr, nullptr,
                                                   -127.0f, 127.0f, bits, nullptr);
        }
    return scale;
}

// c of attention.py: what a step of the scores is as an exponent of 2.
GB_INLINE float steepness(const AttentionArgs* p, int64_t head) {
    const float steep = p->scales[head] * p->scales[p->heads * p->batch + head] * p->steepness;
    return steep <= 0x1p100f ? steep : steep != steep ? 0.0f : 0x1p100f;
}

// How many keys the queries before `last` see.
GB_INLINE int64_t seen_by(const AttentionArgs* p, int64_t last) { return p->causal ? least(p->keys, last) : p->keys; }

// Probabilities of a line of queries for one key; HIDES: some of them do not see it.
template <bool HIDES>
GB_INLINE void probabilities(const int32_t* __restrict scores, const int32_t* __restrict top, float steep, int64_t after,
                             int32_t* __restrict p) {
    GB_INDEPENDENT
    for (int i = 0; i < LINE; i++) {
        float t = (float)(scores[i] - top[i]) * steep;
        t = t > -(float)NOTHING ? t : -(float)NOTHING;
        t = t < 0.0f ? t : 0.0f;  // above: codes that were kept in few bits
        const int32_t whole = (int32_t)(t + (float)NOTHING) - NOTHING;
        const float f = t - (float)whole;
        float power = 0.01355575f * f + 0.05203237f;
        power = power * f + 0.24137977f;
        power = power * f + 0.69303215f;
        power = power * f + 1.0f;
        const float size = as_float((uint32_t)(whole + 127) << 23) * (float)TOP;
        const int32_t found = (int32_t)__builtin_rintf(power * size);
        p[i] = HIDES ? (i < after ? 0 : found) : found;
    }
}

// The largest scores of a line of queries, the first of which is query `first`.
static void tops_of(const AttentionArgs* p, const int32_t* scores, int64_t first, int64_t keys, int32_t* top) {
    for (int i = 0; i < LINE; i++) top[i] = scores[i];  // everybody sees the first key
    for (int64_t j = 1; j < keys; j++) {
        const int32_t* __restrict line = scores + j * LINE;
        const int64_t after = p->causal ? j - first : 0;  // queries from that one on see the key
        GB_INDEPENDENT
        for (int i = 0; i < LINE; i++) top[i] = i >= after && line[i] > top[i] ? line[i] : top[i];
    }
}

// The digits of probabilities for key j.
GB_INLINE void digits_of(const int32_t* __restrict p, const HeadSpace* s, int64_t j) {
    GB_UNROLL for (int d = 0; d < DIGITS; d++) {
        int8_t* __restrict to = s->digits[d] + j * LINE;
        GB_INDEPENDENT
        for (int i = 0; i < LINE; i++) to[i] = (int8_t)(p[i] >> DIGIT * (DIGITS - 1 - d) & ((1 << DIGIT) - 1));
    }
}

// A block of queries to operand a: [key word][query].
static const uint32_t* lay_lines(const HeadSpace* s, const int8_t* digit, int64_t keys) {
    weave(digit, 1, LINE, LINE, keys, 0, keys, s->words, LINE, FLIP);
    return s->words;
}

// A sum of what products with codes, or with all digits of probabilities, give.
template <int COUNT>
GB_INLINE float joined(const int32_t* const* sums, int64_t i) {
    float sum = (float)sums[0][i];
    GB_UNROLL for (int d = 1; d < COUNT; d++) sum = sum * (float)(1 << DIGIT) + (float)sums[d][i];
    return sum;
}

// A row of sums, n of them from `first` on, times a scale.
template <int COUNT, class T>
GB_INLINE void store_row(const HeadSpace* s, int64_t first, int64_t n, float scale, T* __restrict to) {
    const int32_t* from[COUNT];
    for (int d = 0; d < COUNT; d++) from[d] = s->sums[d] + first;
    float held[NORM_BLOCK];
    for (int64_t at = 0; at < n; at += NORM_BLOCK) {
        const int some = (int)least(n - at, NORM_BLOCK);
        for (int i = 0; i < some; i++) held[i] = joined<COUNT>(from, at + i) * scale;
        narrow_lanes(held, some, to + at);
    }
}

template <class T>
static void attend_block(const AttentionArgs* p, HeadSpace* s, int64_t head, int64_t first, T* out) {
    const int64_t rows = least(p->queries - first, LINE), keys = seen_by(p, first + rows);
    const int64_t line = head * p->queries + first;
    lay_panels(&s->query, p->query_codes + line * p->width, rows, p->width, p->width, 1);
    multiply_panels(s->key_words, p->keys, keys, &s->query, s->query.words, s->place, s->scores);
    int32_t top[LINE];
    int64_t sum[LINE] = {0};
    tops_of(p, s->scores, first, keys, top);
    const float steep = steepness(p, head);
    for (int64_t j = 0; j < keys; j++) {
        int32_t found[LINE];
        if (p->causal && j > first)
            probabilities<true>(s->scores + j * LINE, top, steep, j - first, found);
        else
            probabilities<false>(s->scores + j * LINE, top, steep, 0, found);
        for (int i = 0; i < LINE; i++) sum[i] += found[i];
        digits_of(found, s, j);
    }
    const int64_t words = parts_of(keys, G), columns = s->value.panels * 16;
    for (int d = 0; d < DIGITS; d++)
        multiply_panels(lay_lines(s, s->digits[d], keys), LINE, rows, &s->value, words, s->place, s->sums[d]);
    const float scale = p->scales[2 * p->heads * p->batch + head];
    for (int64_t i = 0; i < rows; i++) {
        p->tops[line + i] = top[i], p->sums[line + i] = sum[i];
        store_row<DIGITS>(s, i * columns, p->value_width, scale / (float)sum[i], out + (first + i) * p->output.row);
    }
}

template <class T>
GB_INLINE T* head_of(const Rows* x, const AttentionArgs* p, int64_t head) {
    return (T*)x->at + head / p->heads * x->batch + head % p->heads * x->head;
}

template <class T>
static void attend_head(const AttentionArgs* p, HeadSpace* s, int64_t head) {
    const int64_t all = p->heads * p->batch;
    int8_t* key = p->key_codes + head * p->keys * p->width;
    int8_t* value = p->value_codes + head * p->keys * p->value_width;
    float* scales = p->scales + head;
    scales[0] = codes_of_rows<T, GB_NEAREST>(head_of<const T>(&p->query, p, head), p->query.row, p->queries, p->width,
                                             p->query_codes + head * p->queries * p->width, 0, nullptr);
    scales[all] = codes_of_rows<T, GB_NEAREST>(head_of<const T>(&p->key, p, head), p->key.row, p->keys, p->width, key, 0, nullptr);
    scales[2 * all] = codes_of_rows<T, GB_NEAREST>(head_of<const T>(&p->value, p, head), p->value.row, p->keys, p->value_width,
                                                   value, 0, nullptr);
    const float sum = scales[0] + scales[all] + scales[2 * all];
    if (sum != sum) scales[0] = scales[all] = scales[2 * all] = sum;
    weave(key, p->width, 1, p->keys, p->width, 0, p->width, s->key_words, p->keys, FLIP);
    lay_panels(&s->value, value, p->value_width, 1, p->keys, p->value_width);
    for (int64_t first = 0; first < p->queries; first += LINE)
        attend_block<T>(p, s, head, first, head_of<T>(&p->output, p, head));
}

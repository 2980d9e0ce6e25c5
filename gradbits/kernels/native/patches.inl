// What `grad_weight` multiplies: the gradient and the input of a block of positions, laid out along the positions.

static const int64_t NEAR = 64;  // positions, a multiple of G

struct ColumnsJob;
struct ColumnsSpace;

// How the products are computed: what lays out a block and multiplies it.
struct ColumnsWay {
    int64_t words;  // of a block
    int64_t most;   // output channels of a task; where there are several tasks,
    int64_t unit;   // a multiple of so many
    int64_t rows;   // sums have a multiple of so many
    int64_t past;   // room for words of `b` that are read behind the last, and
    int64_t tiles;  // for words of `a` that are laid out once more, in units of `rows`
    Flip flip;      // how `b` travels
    void (*multiply)(const ColumnsJob*, ColumnsSpace*, const Block*, int64_t rows, int64_t width, bool add);
    void (*enter)();  // what every thread does first, and last
    void (*leave)();
};

struct ColumnsJob {
    const ProductArgs* p;
    const ColumnsWay* way;
    Blocks blocks;
    int64_t taps, copies, words;                    // taps; those of axes 0 and 2; words of a line
    int64_t rows_each, channels_each;               // output and input channels of a task
    int64_t row_parts, channel_parts, splits, blocks_each;
    int64_t tasks, next;
    int64_t* total;  // [group][row][tap][channel], where several tasks share a sum
    int how, failed, lock;
};

struct ColumnsSpace {
    uint32_t *a, *b, *tiles;
    int32_t *sums, *start, *place;
};

GB_INLINE int64_t odd_lines(int64_t n) { return (n + 15) / 32 * 32 + 16; }  // words: an odd number of cache lines

// Lay out the gradient of a block: [line][sample][word][row].
static void lay_gradient(const ColumnsJob* job, const Block* k, int64_t group, int64_t row, int64_t rows, uint32_t* a,
                         int64_t pitch) {
    const ProductArgs* p = job->p;
    const int8_t* g = p->w + group * p->w_group + row * p->w_column + k->at0 * p->w_tap[0] + k->at2 * p->w_tap[2];
    for (int64_t i1 = k->at1; i1 < k->at1 + k->n1; i1++)
        for (int64_t s = k->sample; s < k->sample + k->samples; s++, a += parts_of(k->n2, G) * pitch)
            weave(g + i1 * p->w_tap[1] + s * p->w_channel, p->w_column, p->w_tap[2], rows, k->n2, 0, k->n2, a, pitch, PLAIN);
}

// Lay out the input of a block: [panel][tap 0][tap 2][plane][slot][sample][word][16].
static void lay_patches(const ColumnsJob* job, const Block* k, int64_t group, int64_t channel, int64_t width, uint32_t* b) {
    const ProductArgs* p = job->p;
    const int64_t lines = job->blocks.planes * job->blocks.slots, words = parts_of(k->n2, G);
    const int64_t each = job->copies * lines * k->samples * words * 16, code = p->stride[2] * p->x_axis[2];
    const int8_t* x = p->x + group * p->x_group + channel * p->x_channel + k->sample * p->x_sample;
    for (int64_t t0 = 0; t0 < p->taps[0]; t0++)
        for (int64_t t2 = 0; t2 < p->taps[2]; t2++) {
            int64_t first, last, column = columns_of(p, k, t2, &first, &last);
            int64_t i0 = k->at0 * p->stride[0] - p->padding[0] + t0 * p->dilation[0];
            for (int64_t line = 0; line < lines; line++) {
                int64_t i1 = line_in(p, k, line / job->blocks.slots, line % job->blocks.slots);
                bool there = inside(i0, p->size[0]) && inside(i1, p->size[1]) && first < last;
                const int8_t* from = x + i0 * p->x_axis[0] + i1 * p->x_axis[1] + column * p->x_axis[2];
                for (int64_t s = 0; s < k->samples; s++, b += words * 16, from += p->x_sample)
                    // a few positions of every panel after the other: lines of the cache are read once
                    for (int64_t c = 0; c < k->n2; c += NEAR)
                        for (int64_t panel = 0; panel < width;) {
                            uint32_t* to = b + panel / 16 * each + c / G * 16;
                            const int8_t* codes = from + panel * p->x_channel + c * code;
                            const int64_t n = least(k->n2 - c, NEAR);
                            if (there && weave_panels(codes, p->x_channel, code, width - panel, n, first - c, last - c, to,
                                                      each, job->way->flip)) {
                                panel += 64;
                                continue;
                            }
                            if (there)
                                weave(codes, p->x_channel, code, least(width - panel, 16), n, first - c, last - c, to, 16,
                                      job->way->flip);
                            else
                                weave_zeros(to, parts_of(n, G) * 16, job->way->flip);
                            panel += 16;
                        }
            }
        }
}

// Words of a line, a copy and a panel of the laid out input, and of all positions of a block.
struct Patches {
    int64_t line, copy, panel, words;
};

GB_INLINE Patches patches_of(const ColumnsJob* job, const Block* k) {
    const Blocks* b = &job->blocks;
    const int64_t words = k->samples * parts_of(k->n2, G), copy = b->planes * b->slots * words * 16;
    return {words * 16, copy, job->copies * copy, k->n1 * words};
}

// Where the first panel of a tap begins.
GB_INLINE int64_t patch_at(const ColumnsJob* job, const Patches* f, int64_t t) {
    const ProductArgs* p = job->p;
    const int64_t t2 = t % p->taps[2], t1 = t / p->taps[2] % p->taps[1], t0 = t / p->taps[2] / p->taps[1];
    return (t0 * p->taps[2] + t2) * f->copy + slot_of(p, &job->blocks, t1) * f->line;
}

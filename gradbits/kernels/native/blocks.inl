// Blocks of positions: what is laid out together, and where the codes of a tap lie in it.
//
// A block covers one coordinate of the first axis, ranges of the other two and some samples; its positions are numbered
// ((second * samples) + sample) * n2 + third. Input lines lie in slots by their remainder modulo the second stride, so
// that the same tap of the next line is in the next slot, and every tap of the third axis has a copy of its own: a tap
// is then one offset for all positions of the block.

GB_INLINE int64_t volume(const int64_t* n) { return n[0] * n[1] * n[2]; }
GB_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
GB_INLINE int64_t parts_of(int64_t all, int64_t each) { return (all + each - 1) / each; }

// How the positions are divided.
struct Blocks {
    int64_t n1, n2, samples;             // size of a block
    int64_t parts1, parts2, parts, all;  // blocks along the two axes, along the samples, and together
    int64_t slots, planes;               // lines kept for one remainder, remainders
};

struct Block {
    int64_t at0, at1, at2, n1, n2, sample, samples;
};

GB_INLINE int64_t reach(const ProductArgs* p) { return (p->taps[1] - 1) * p->dilation[1] / p->stride[1]; }

static void divide(const ProductArgs* p, Blocks* b) {
    // equal parts
    b->n1 = parts_of(p->count[1], parts_of(p->count[1], b->n1));
    b->samples = parts_of(p->samples, parts_of(p->samples, b->samples));
    b->parts1 = parts_of(p->count[1], b->n1);
    b->parts2 = parts_of(p->count[2], b->n2);
    b->parts = parts_of(p->samples, b->samples);
    b->all = p->count[0] * b->parts1 * b->parts2 * b->parts;
    b->slots = b->n1 + reach(p);
    b->planes = least(p->stride[1], (p->taps[1] - 1) * p->dilation[1] + 1);
}

GB_INLINE Block block_at(const ProductArgs* p, const Blocks* b, int64_t index) {
    Block k;
    int64_t i2 = index % b->parts2, i1 = index / b->parts2 % b->parts1, rest = index / (b->parts2 * b->parts1);
    k.at0 = rest % p->count[0], k.at1 = i1 * b->n1, k.at2 = i2 * b->n2, k.sample = rest / p->count[0] * b->samples;
    k.n1 = least(p->count[1] - k.at1, b->n1), k.n2 = least(p->count[2] - k.at2, b->n2);
    k.samples = least(p->samples - k.sample, b->samples);
    return k;
}

// The slot, counted over all planes, that holds the line of tap t1 for the block's first line.
GB_INLINE int64_t slot_of(const ProductArgs* p, const Blocks* b, int64_t t1) {
    int64_t v = t1 * p->dilation[1];
    return v % p->stride[1] * b->slots + v / p->stride[1];
}

// Coordinate of the input line in slot `slot` of plane `plane`.
GB_INLINE int64_t line_in(const ProductArgs* p, const Block* k, int64_t plane, int64_t slot) {
    return (k->at1 + slot) * p->stride[1] + plane - p->padding[1];
}

GB_INLINE bool inside(int64_t i, int64_t n) { return i >= 0 && i < n; }

// Of n2 positions from at2 on, those whose tap t2 lies inside the input: first .. last - 1; returns the column of the first
// position, inside or not.
GB_INLINE int64_t columns_of(const ProductArgs* p, const Block* k, int64_t t2, int64_t* first, int64_t* last) {
    int64_t s = p->stride[2], column = k->at2 * s - p->padding[2] + t2 * p->dilation[2];
    *first = column < 0 ? least((-column + s - 1) / s, k->n2) : 0;
    *last = column >= p->size[2] ? 0 : least((p->size[2] - 1 - column) / s + 1, k->n2);
    if (*last < *first) *last = *first;
    return column;
}

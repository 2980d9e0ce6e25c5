// Depthwise convolutions with channels last: every channel is a group of its own, so lanes are groups. What its products
// share.

static const int DEPTH_BLOCK = 64;          // lanes at once
static const int64_t DEPTH_TERMS = 100000;      // products in a sum in int32 before it goes to int64

struct DepthJob {
    const ProductArgs* p;
    ProductArgs lanes;  // the same with groups as channels, for the epilogue
    uint32_t* w;        // [tap 2][word of taps 0 and 1][pitch]
    int32_t* start;     // [pitch]
    int64_t* totals;    // [tap][pitch], of grad_weight
    int64_t pitch, taps, words, lines, next;
    int how, lock, failed;
};

GB_INLINE Words words_at(const int32_t* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof words);
    return words;
}

static void depth_lanes(DepthJob* job, const ProductArgs* p) {
    job->p = p;
    job->lanes = *p;
    job->lanes.columns = p->groups, job->lanes.groups = 1, job->lanes.r_channel = p->r_group;
    Epilogue* e = &job->lanes.epilogue;
    e->scale.channel = e->scale.group, e->scale.group = 0;
    for (int t = 0; t < e->count; t++) e->terms[t].channel = e->terms[t].group, e->terms[t].group = 0;
    job->pitch = parts_of(p->groups, DEPTH_BLOCK) * DEPTH_BLOCK;
    job->taps = volume(p->taps);
    job->words = p->taps[0] * parts_of(p->taps[1], G);
    job->lines = p->samples * p->count[0] * p->count[1];
}

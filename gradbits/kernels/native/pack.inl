// Codes of 4 and 2 bits to bytes and back, as gradbits/core/packing.py does.

// Bytes first .. last - 1; what is missing in the last byte of all is zero.
template <int WIDTH>
GB_INLINE void pack_span(const uint8_t* from, uint8_t* to, int64_t count, int64_t first, int64_t last) {
    const int per = 8 / WIDTH, mask = (1 << WIDTH) - 1;
    int64_t whole = count / per < last ? count / per : last;
    for (int64_t i = first; i < whole; i++) {
        int byte = 0;
        for (int lane = 0; lane < per; lane++) byte |= (from[i * per + lane] & mask) << (WIDTH * lane);
        to[i] = (uint8_t)byte;
    }
    for (int64_t i = whole < first ? first : whole; i < last; i++) {
        int byte = 0;
        for (int lane = 0; i * per + lane < count; lane++) byte |= (from[i * per + lane] & mask) << (WIDTH * lane);
        to[i] = (uint8_t)byte;
    }
}

template <int WIDTH>
GB_INLINE int8_t code_in(int byte, int lane) {
    return (int8_t)((int8_t)(byte << (8 - WIDTH * (lane + 1))) >> (8 - WIDTH));  // arithmetic: extends the sign
}

template <int WIDTH>
GB_INLINE void unpack_span(const uint8_t* from, int8_t* to, int64_t count, int64_t first, int64_t last) {
    const int per = 8 / WIDTH;
    int64_t whole = count / per < last ? count / per : last;
    for (int64_t i = first; i < whole; i++)
        for (int lane = 0; lane < per; lane++) to[i * per + lane] = code_in<WIDTH>(from[i], lane);
    for (int64_t i = whole < first ? first : whole; i < last; i++)
        for (int lane = 0; i * per + lane < count; lane++) to[i * per + lane] = code_in<WIDTH>(from[i], lane);
}

struct PackJob {
    const PackArgs* p;
    int64_t bytes, next;
};

template <bool PACK>
static void pack_body(void* data) {
    PackJob* job = (PackJob*)data;
    const PackArgs* p = job->p;
    for (int64_t first; (first = gb_take(&job->next) * TASK) < job->bytes;) {
        int64_t last = first + TASK < job->bytes ? first + TASK : job->bytes;
        if (PACK && p->width == 4) pack_span<4>((const uint8_t*)p->from, (uint8_t*)p->to, p->count, first, last);
        if (PACK && p->width == 2) pack_span<2>((const uint8_t*)p->from, (uint8_t*)p->to, p->count, first, last);
        if (!PACK && p->width == 4) unpack_span<4>((const uint8_t*)p->from, (int8_t*)p->to, p->count, first, last);
        if (!PACK && p->width == 2) unpack_span<2>((const uint8_t*)p->from, (int8_t*)p->to, p->count, first, last);
    }
}

static int pack(const PackArgs* p) {
    PackJob job = {p, (p->count * p->width + 7) / 8, 0};
    gb_parallel(job.bytes > TASK ? p->threads : 1, pack_body<true>, &job);
    return GB_OK;
}

static int unpack(const PackArgs* p) {
    PackJob job = {p, (p->count * p->width + 7) / 8, 0};
    gb_parallel(job.bytes > TASK ? p->threads : 1, pack_body<false>, &job);
    return GB_OK;
}

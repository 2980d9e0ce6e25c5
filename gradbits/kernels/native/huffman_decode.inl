// Huffman streams to symbols: eight streams at a time, several symbols a look-up, no byte read outside the payload.

static const int HUFFMAN_LANES = 8;
static const int HUFFMAN_TABLE = 11;  // bits of a look-up, where no code is longer: the table stays in the first cache

struct DecodeTables {
    uint64_t* many;
    uint16_t* one;
    int bits;
};

struct DecodeStream {
    uint8_t *out, *end;     // symbols still to come
    int64_t position, size;  // bits: where it reads, where it ends
};

GB_INLINE uint64_t window(const uint8_t* payload, int64_t position) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, payload + (position >> 3), 8);
    return big_endian(bytes) << (position & 7);
}

GB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rounds of LOOKUPS look-ups in each of LANES streams, as many as surely stay inside the symbols and the payload.
template <int LANES, int LOOKUPS>
GB_INLINE int64_t decode_rounds(DecodeStream* s, const uint8_t* payload, int64_t bytes, const uint64_t* table,
                                int bits) {
    int64_t rounds = INT64_MAX;
    for (int lane = 0; lane < LANES; lane++) {
        int64_t symbols = s[lane].end - s[lane].out - 8 + HUFFMAN_MANY;  // a look-up touches eight bytes
        rounds = smaller(rounds, symbols / (LOOKUPS * HUFFMAN_MANY));
        rounds = smaller(rounds, (bytes - (s[lane].position >> 3)) / 8);  // a round moves on by at most 57 bits
    }
    if (rounds <= 0) return 0;
    uint8_t* out[LANES];
    int64_t position[LANES];
    for (int lane = 0; lane < LANES; lane++) out[lane] = s[lane].out, position[lane] = s[lane].position;
    const int down = 64 - bits;
    for (int64_t round = 0; round < rounds; round++) {
        GB_UNROLL
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t word = window(payload, position[lane]);
            GB_UNROLL
            for (int i = 0; i < LOOKUPS; i++) {
                uint64_t entry = table[word >> down];
                __builtin_memcpy(out[lane], &entry, 8);
                out[lane] += entry >> 56 & 15;
                word <<= entry >> 60;
                position[lane] += (int64_t)(entry >> 60);
            }
        }
    }
    for (int lane = 0; lane < LANES; lane++) s[lane].out = out[lane], s[lane].position = position[lane];
    return rounds;
}

// What is left of one stream, symbol by symbol; false where it does not end where its codes end.
static bool decode_rest(DecodeStream* s, const uint8_t* payload, int64_t bytes, const DecodeTables* t) {
    for (; s->out < s->end; s->out++) {
        uint32_t word = 0;
        for (int i = 0; i < 3; i++) {
            int64_t at = (s->position >> 3) + i;
            word = word << 8 | (at < bytes ? payload[at] : 0);
        }
        int single = t->one[word >> (24 - t->bits - (s->position & 7)) & ((1u << t->bits) - 1)];
        *s->out = (uint8_t)(single >> 4);
        s->position += single & 15;
        if (s->position > s->size) return false;
    }
    int64_t padding = s->size - s->position;
    return padding >= 0 && padding < 8 && (!padding || !(payload[s->position >> 3] & ((1 << padding) - 1)));
}

template <int LOOKUPS>
static bool decode_streams(DecodeStream* s, int lanes, const uint8_t* payload, int64_t bytes, const DecodeTables* t) {
    if (lanes == HUFFMAN_LANES)
        while (decode_rounds<HUFFMAN_LANES, LOOKUPS>(s, payload, bytes, t->many, t->bits)) {
        }
    bool good = true;
    for (int lane = 0; lane < lanes; lane++) {
        while (decode_rounds<1, LOOKUPS>(s + lane, payload, bytes, t->many, t->bits)) {
        }
        while (decode_rounds<1, 1>(s + lane, payload, bytes, t->many, t->bits)) {
        }
        good &= decode_rest(s + lane, payload, bytes, t);
    }
    return good;
}

// One symbol has a code, of one bit: the stream is nothing but zeros.
static bool decode_constant(DecodeStream* s, const uint8_t* payload, int symbol) {
    int64_t count = s->end - s->out, first = s->position >> 3, last = s->size >> 3;
    uint8_t seen = 0;
    for (int64_t i = first; i < last; i++) seen |= payload[i];
    __builtin_memset(s->out, symbol, (size_t)count);
    return !seen && last - first == (count + 7) / 8;
}

struct DecodeJob {
    const HuffmanArgs* h;
    const HuffmanCode* code;
    DecodeTables tables;
    const int64_t* starts;  // first byte of every group of lanes
    int64_t streams, next;
    int32_t bad;
};

static void decode_body(void* data) {
    DecodeJob* job = (DecodeJob*)data;
    const HuffmanArgs* h = job->h;
    DecodeStream s[HUFFMAN_LANES];
    for (int64_t group; (group = gb_take(&job->next)) * HUFFMAN_LANES < job->streams;) {
        int64_t first = group * HUFFMAN_LANES, at = job->starts[group] * 8;
        int lanes = (int)smaller(HUFFMAN_LANES, job->streams - first);
        for (int lane = 0; lane < lanes; lane++) {
            int64_t begin = (first + lane) * h->chunk;
            s[lane] = {h->symbols + begin, h->symbols + smaller(begin + h->chunk, h->count), at,
                       at + (int64_t)h->sizes[first + lane] * 8};
            at = s[lane].size;
        }
        bool good = true;
        if (job->code->used == 1)
            for (int lane = 0; lane < lanes; lane++) good &= decode_constant(s + lane, h->payload, job->code->only);
        else if (job->tables.bits <= HUFFMAN_TABLE)
            good = decode_streams<5>(s, lanes, h->payload, h->bytes, &job->tables);
        else
            good = decode_streams<3>(s, lanes, h->payload, h->bytes, &job->tables);
        if (!good) __atomic_store_n(&job->bad, 1, __ATOMIC_RELAXED);
    }
}

// `sizes` add up to at most `bytes`; `work` has room for both tables and the starts.
static int huffman_decode(const HuffmanArgs* h) {
    uint16_t codes[256];
    HuffmanCode code;
    if (!huffman_code(&code, h, codes)) return GB_BAD_DATA;
    int bits = code.longest > HUFFMAN_TABLE ? HUFFMAN_LONGEST : HUFFMAN_TABLE;
    int64_t streams = (h->count + h->chunk - 1) / h->chunk, groups = (streams + HUFFMAN_LANES - 1) / HUFFMAN_LANES;
    uint64_t* many = (uint64_t*)h->work;
    uint16_t* one = (uint16_t*)(many + (1 << bits));
    int64_t *starts = (int64_t*)(one + (1 << bits)), at = 0;
    for (int64_t i = 0; i < streams; i++) {
        if (i % HUFFMAN_LANES == 0) starts[i / HUFFMAN_LANES] = at;
        at += h->sizes[i];
    }
    if (at != h->bytes) return GB_BAD_DATA;
    if (code.used > 1) {
        huffman_singles(one, &code, bits);
        huffman_multiples(many, one, bits);
    }
    DecodeJob job = {h, &code, {many, one, bits}, starts, streams, 0, 0};
    gb_parallel(groups > 1 ? h->threads : 1, decode_body, &job);
    return job.bad ? GB_BAD_DATA : GB_OK;
}

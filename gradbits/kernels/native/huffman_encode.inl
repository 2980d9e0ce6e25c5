// Symbols to Huffman streams: `chunk` symbols a stream, most significant bit first, each padded with zeros to a byte.

static const int64_t HUFFMAN_STREAMS = 16;  // streams that one thread takes

GB_INLINE uint64_t big_endian(uint64_t x) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return x;
#else
    return __builtin_bswap64(x);
#endif
}

// Whole bytes are at `out`; of what is left, the lowest `bits` of `word`.
struct BitWriter {
    uint8_t* out;
    uint64_t word, bits;
};

GB_INLINE void put(BitWriter* w, uint64_t entry) {
    w->word = w->word << (entry & 63) | entry >> 8;
    w->bits += entry & 63;
}

// Write everything, the last byte padded with zeros, and keep what is in that byte; touches eight bytes of memory.
GB_INLINE void flush(BitWriter* w) {
    uint64_t bytes = big_endian(w->word << ((64 - w->bits) & 63));
    __builtin_memcpy(w->out, &bytes, 8);
    w->out += w->bits >> 3;
    w->bits &= 7;
}

// Table indices of groups of four symbols below 8, of two below 64, or of one; not 0 where a symbol is too large.
template <int GROUP>
GB_INLINE uint32_t group_indices(const uint8_t* symbols, uint16_t* index, int groups) {
    uint32_t over = 0;
    for (int i = 0; i < groups; i++) {
        if (GROUP == 4) {
            uint32_t x = (uint32_t)symbols[4 * i] | (uint32_t)symbols[4 * i + 1] << 8 |
                         (uint32_t)symbols[4 * i + 2] << 16 | (uint32_t)symbols[4 * i + 3] << 24;
            over |= x & 0xf8f8f8f8u;
            x |= x >> 5;
            index[i] = (uint16_t)((x & 63) | (x >> 10 & 0xfc0));
        } else if (GROUP == 2) {
            uint32_t low = symbols[2 * i], high = symbols[2 * i + 1];
            over |= (low | high) & 0xc0u;
            index[i] = (uint16_t)((low & 63) | (high & 63) << 6);
        } else {
            index[i] = symbols[i];
        }
    }
    return over;
}

// One stream; returns its bytes, or -1 where a symbol has no code. Touches up to 8 bytes more than it returns.
template <int GROUP, int PUTS>
static int64_t encode_stream(const uint8_t* symbols, int64_t n, const uint64_t* table, const HuffmanCode* c,
                             uint8_t* out) {
    const int HELD = 510;  // groups at once: a multiple of every PUTS
    uint16_t index[HELD];
    BitWriter w = {out, 0, 0};
    uint64_t seen = 0;
    int64_t at = 0;
    for (int64_t groups = n / GROUP; groups >= PUTS;) {
        int held = (int)(groups < HELD ? groups : HELD) / PUTS * PUTS;
        if (group_indices<GROUP>(symbols + at, index, held)) return -1;
        for (int i = 0; i < held; i += PUTS) {
            GB_UNROLL
            for (int j = 0; j < PUTS; j++) {
                uint64_t entry = table[index[i + j]];
                seen |= entry;
                put(&w, entry);
            }
            flush(&w);
        }
        groups -= held;
        at += (int64_t)held * GROUP;
    }
    for (; at < n; at++) {
        int s = symbols[at];
        if (s >= c->alphabet || !c->lengths[s]) return -1;
        put(&w, (uint64_t)c->codes[s] << 8 | c->lengths[s]);
        flush(&w);
    }
    return seen & HUFFMAN_MISSING ? -1 : w.out - out + (w.bits > 0);
}

typedef int64_t (*EncodeStream)(const uint8_t*, int64_t, const uint64_t*, const HuffmanCode*, uint8_t*);

struct EncodeJob {
    const HuffmanArgs* h;
    const HuffmanCode* code;
    const uint64_t* table;
    EncodeStream stream;
    int64_t streams, task, next, room;  // `task`: streams that a thread takes at once; `room`: most bytes of one
    int32_t bad;
};

// The streams of a task are adjacent; tasks begin where they would if every stream had its most bytes.
static void encode_body(void* data) {
    EncodeJob* job = (EncodeJob*)data;
    const HuffmanArgs* h = job->h;
    for (int64_t first; (first = gb_take(&job->next) * job->task) < job->streams;) {
        uint8_t* out = h->payload + first * job->room;
        for (int64_t i = first; i < job->streams && i < first + job->task; i++) {
            int64_t at = i * h->chunk, n = h->count - at < h->chunk ? h->count - at : h->chunk;
            int64_t bytes = job->stream(h->symbols + at, n, job->table, job->code, out);
            if (bytes < 0) __atomic_store_n(&job->bad, 1, __ATOMIC_RELAXED);
            h->sizes[i] = bytes < 0 ? 0 : (uint32_t)bytes;
            out += h->sizes[i];
        }
    }
}

// `payload` has room for 8 bytes and (bytes of `chunk` codes of the longest length) a stream.
static int huffman_encode(const HuffmanArgs* h) {
    static const int LARGEST = 1 << 12;
    uint16_t codes[256];
    HuffmanCode code;
    if (!huffman_code(&code, h, codes)) return GB_BAD_DATA;
    uint64_t table[LARGEST];
    huffman_groups(table, &code);
    int group = huffman_group(code.alphabet);
    EncodeStream stream = group == 4                            ? encode_stream<4, 2>
                          : group == 2 && code.longest <= 14 ? encode_stream<2, 2>
                          : group == 2                          ? encode_stream<2, 1>
                                                                : encode_stream<1, 3>;
    int64_t streams = (h->count + h->chunk - 1) / h->chunk, room = (h->chunk * code.longest + 7) / 8 + 8;
    int threads = streams > HUFFMAN_STREAMS ? h->threads : 1;
    int64_t task = threads > 1 ? HUFFMAN_STREAMS : streams;
    EncodeJob job = {h, &code, table, stream, streams, task, 0, room, 0};
    gb_parallel(threads, encode_body, &job);
    if (job.bad) return GB_BAD_DATA;
    int64_t at = 0;
    for (int64_t i = 0; i < streams;) {
        int64_t bytes = 0, from = i * room;
        for (int64_t last = i + task; i < streams && i < last; i++) bytes += h->sizes[i];
        __builtin_memmove(h->payload + at, h->payload + from, (size_t)bytes);
        at += bytes;
    }
    return GB_OK;
}

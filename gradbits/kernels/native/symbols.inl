// Symbols of 1 to 8 bits to bytes without gaps and back, as gradbits/core/packing.py does: eight make `bits` bytes.

// symbols that pass through the buffers at once; symbols that one thread takes
static const int WIRE_BLOCK = 1024;
static const int64_t WIRE_TASK = 1 << 15;

GB_INLINE uint64_t little_endian(uint64_t x) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(x);
#else
    return x;
#endif
}

// `width` ones at the low end of every `every` bits.
constexpr uint64_t ones(int width, int every) {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += every) mask |= ((width < 64 ? 1ull << width : 0) - 1) << at;
    return mask;
}

// Fields of WIDTH bits, one every EVERY bits: every other one moves down to its neighbour, or back.
template <int WIDTH, int EVERY>
GB_INLINE uint64_t join(uint64_t x) {
    return (x & ones(WIDTH, 2 * EVERY)) | (x >> (EVERY - WIDTH) & ones(WIDTH, 2 * EVERY) << WIDTH);
}

template <int WIDTH, int EVERY>
GB_INLINE uint64_t part(uint64_t x) {
    return (x & ones(WIDTH, 2 * EVERY)) | (x << (EVERY - WIDTH) & ones(WIDTH, 2 * EVERY) << EVERY);
}

// Eight symbols, one a byte, to one every BITS bits, and back.
template <int BITS>
GB_INLINE uint64_t squeeze(uint64_t x) {
    return join<4 * BITS, 32>(join<2 * BITS, 16>(join<BITS, 8>(x)));
}

template <int BITS>
GB_INLINE uint64_t stretch(uint64_t x) {
    return part<BITS, 8>(part<2 * BITS, 16>(part<4 * BITS, 32>(x)));
}

// n symbols to (n * BITS + 7) / 8 bytes, no more; what is missing in the last byte is zero.
template <int BITS>
static void pack_block(const uint8_t* from, uint8_t* to, int n) {
    int groups = n / 8, bytes = n * BITS / 8;
    int safe = bytes < 8 ? 0 : (bytes - 8) / BITS + 1;  // groups that may touch eight bytes
    int i = 0;
#if GB_VNNI
    if (BITS == 4) {
        const __m512i weights = _mm512_set1_epi16(0x1001);  // the even symbol, and 16 times the odd one
        for (; i + 8 <= groups; i += 8) {
            __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(from + 8 * i), weights);
            _mm256_storeu_si256((__m256i*)(to + 4 * i), _mm512_cvtepi16_epi8(pairs));
        }
    }
#endif
    for (; i < groups; i++) {
        uint64_t x;
        __builtin_memcpy(&x, from + 8 * i, 8);
        x = little_endian(squeeze<BITS>(little_endian(x)));
        if (i < safe)
            __builtin_memcpy(to + i * BITS, &x, 8);
        else
            __builtin_memcpy(to + i * BITS, &x, BITS);
    }
    if (n % 8) {
        uint64_t x = 0;
        __builtin_memcpy(&x, from + 8 * i, (size_t)(n % 8));
        x = little_endian(squeeze<BITS>(little_endian(x)));
        __builtin_memcpy(to + i * BITS, &x, (size_t)(n % 8 * BITS + 7) / 8);
    }
}

// n symbols from (n * BITS + 7) / 8 bytes, no more; eight symbols more than n may be touched.
template <int BITS>
static void unpack_block(const uint8_t* from, uint8_t* to, int n) {
    int groups = (n + 7) / 8, bytes = (n * BITS + 7) / 8;
    for (int i = 0; i < groups; i++) {
        uint64_t x = 0;
        int left = bytes - i * BITS;
        if (left >= 8)
            __builtin_memcpy(&x, from + i * BITS, 8);
        else
            __builtin_memcpy(&x, from + i * BITS, (size_t)(left < BITS ? left : BITS));
        x = little_endian(stretch<BITS>(little_endian(x)));
        __builtin_memcpy(to + 8 * i, &x, 8);
    }
}

template <>
void pack_block<8>(const uint8_t* from, uint8_t* to, int n) {
    __builtin_memcpy(to, from, (size_t)n);
}

template <>
void unpack_block<8>(const uint8_t* from, uint8_t* to, int n) {
    __builtin_memcpy(to, from, (size_t)n);
}

typedef void (*Repack)(const uint8_t*, uint8_t*, int);

GB_INLINE Repack packer(int bits) {
    const Repack table[] = {pack_block<1>, pack_block<2>, pack_block<3>, pack_block<4>,
                            pack_block<5>, pack_block<6>, pack_block<7>, pack_block<8>};
    return table[bits - 1];
}

GB_INLINE Repack unpacker(int bits) {
    const Repack table[] = {unpack_block<1>, unpack_block<2>, unpack_block<3>, unpack_block<4>,
                            unpack_block<5>, unpack_block<6>, unpack_block<7>, unpack_block<8>};
    return table[bits - 1];
}

struct SymbolsJob {
    const SymbolsArgs* p;
    int64_t next;
    bool pack;
};

static void symbols_body(void* data) {
    SymbolsJob* job = (SymbolsJob*)data;
    const SymbolsArgs* p = job->p;
    Repack repack = job->pack ? packer(p->bits) : unpacker(p->bits);
    uint8_t buffer[WIRE_BLOCK];
    for (int64_t first; (first = gb_take(&job->next) * WIRE_TASK) < p->count;) {
        int64_t last = first + WIRE_TASK < p->count ? first + WIRE_TASK : p->count;
        for (int64_t at = first; at < last; at += WIRE_BLOCK) {
            int n = (int)(last - at < WIRE_BLOCK ? last - at : WIRE_BLOCK);
            if (job->pack) {
                repack(p->symbols + at, p->packed + at / 8 * p->bits, n);
            } else if (n == WIRE_BLOCK) {
                repack(p->packed + at / 8 * p->bits, p->symbols + at, n);
            } else {
                repack(p->packed + at / 8 * p->bits, buffer, n);
                __builtin_memcpy(p->symbols + at, buffer, (size_t)n);
            }
        }
    }
}

static int pack_symbols(const SymbolsArgs* p) {
    SymbolsJob job = {p, 0, true};
    gb_parallel(p->count > WIRE_TASK ? p->threads : 1, symbols_body, &job);
    return GB_OK;
}

static int unpack_symbols(const SymbolsArgs* p) {
    SymbolsJob job = {p, 0, false};
    gb_parallel(p->count > WIRE_TASK ? p->threads : 1, symbols_body, &job);
    return GB_OK;
}

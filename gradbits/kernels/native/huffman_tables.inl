// Look-up tables of a canonical Huffman code: several symbols per look-up, for coding and for decoding.

static const int HUFFMAN_LONGEST = 15;
static const int HUFFMAN_MANY = 7;  // symbols that one entry of the decoder holds at most

// The code of `lengths`; false where the lengths are not those of a complete code (or of one symbol of length 1).
struct HuffmanCode {
    const uint8_t* lengths;
    int32_t alphabet, longest, used, only;  // `only`: a symbol that has a code
    uint16_t* codes;                        // [alphabet]
};

static bool huffman_code(HuffmanCode* c, const HuffmanArgs* h, uint16_t* codes) {
    *c = {h->lengths, h->alphabet, 0, 0, 0, codes};
    int32_t count[HUFFMAN_LONGEST + 1] = {0}, next[HUFFMAN_LONGEST + 1];
    for (int32_t s = 0; s < c->alphabet; s++) {
        int length = c->lengths[s];
        if (length > HUFFMAN_LONGEST) return false;
        if (!length) continue;
        count[length]++;
        c->used++;
        c->only = s;
        if (length > c->longest) c->longest = length;
    }
    uint32_t code = 0;
    for (int length = 1; length <= HUFFMAN_LONGEST; length++) {
        next[length] = (int32_t)code;
        code = (code + (uint32_t)count[length]) << 1;
    }
    if (code != 2u << HUFFMAN_LONGEST && !(c->used == 1 && c->longest == 1)) return false;
    for (int32_t s = 0; s < c->alphabet; s++) codes[s] = c->lengths[s] ? (uint16_t)next[c->lengths[s]]++ : 0;
    return true;
}

// Symbols in a group that is coded with one look-up, and the bits of one symbol in the table's index.
GB_INLINE int huffman_group(int32_t alphabet) { return alphabet <= 8 ? 4 : alphabet <= 64 ? 2 : 1; }
GB_INLINE int huffman_width(int32_t alphabet) { return alphabet <= 8 ? 3 : alphabet <= 64 ? 6 : 8; }

static const uint64_t HUFFMAN_MISSING = 128;

// Entry of a group whose first symbol is in the lowest bits of the index: code << 8 | length; HUFFMAN_MISSING where a
// symbol has no code.
static void huffman_groups(uint64_t* table, const HuffmanCode* c) {
    int group = huffman_group(c->alphabet), width = huffman_width(c->alphabet);
    for (int32_t index = 0; index < 1 << (group * width); index++) {
        uint64_t code = 0, bits = 0;
        bool missing = false;
        for (int i = 0; i < group; i++) {
            int32_t s = index >> (i * width) & ((1 << width) - 1);
            int length = s < c->alphabet ? c->lengths[s] : 0;
            missing |= !length;
            code = code << length | (length ? c->codes[s] : 0);
            bits += (uint64_t)length;
        }
        table[index] = missing ? HUFFMAN_MISSING : code << 8 | bits;
    }
}

// For every pattern of `bits` bits the symbol it begins with: symbol << 4 | length.
static void huffman_singles(uint16_t* table, const HuffmanCode* c, int bits) {
    for (int32_t s = 0; s < c->alphabet; s++) {
        int length = c->lengths[s];
        if (!length) continue;
        int32_t first = (int32_t)c->codes[s] << (bits - length), span = 1 << (bits - length);
        for (int32_t i = 0; i < span; i++) table[first + i] = (uint16_t)(s << 4 | length);
    }
}

// For every pattern the whole symbols in it, the first in the lowest byte; above them their number and their bits.
static void huffman_multiples(uint64_t* table, const uint16_t* singles, int bits) {
    int32_t mask = (1 << bits) - 1;
    for (int32_t pattern = 0; pattern <= mask; pattern++) {
        uint64_t entry = 0;
        int count = 0, at = 0;
        while (count < HUFFMAN_MANY) {
            int single = singles[pattern << at & mask];
            if (at + (single & 15) > bits) break;
            entry |= (uint64_t)(single >> 4) << (8 * count++);
            at += single & 15;
        }
        table[pattern] = entry | (uint64_t)count << 56 | (uint64_t)at << 60;
    }
}

// Formats whose weights are points of a codebook (IQ1, IQ2, IQ3) and ternary ones (TQ); see formats.cuh. A point is
// 16 bits in a table that codebooks.py writes from moe_ref's: 8 codes of 2 bits, or (IQ3) 4 of 4, of the levels that
// a weight may have. The tables lie in global memory: lanes ask for different points, which constant memory would
// serve one by one; 0.5 to 4 KB stay in L1.
#define LEVELS_2 0x002b1908u           // 8 25 43
#define LEVELS_1_DOWN 0x0007fff7u      // 8 (-1 0 1) - 1
#define LEVELS_1_UP 0x000901f9u        // 8 (-1 0 1) + 1
#define LEVELS_3XXS 0x1c140c04u, 0x3e342c24u  // 4 12 20 28 36 44 52 62
#define LEVELS_3S 0x07050301u, 0x0f0d0b09u    // 1 3 5 ... 15

// The levels that four 2-bit codes choose.
__device__ __forceinline__ uint32_t four(uint32_t levels, uint32_t codes) {
    codes &= 255;
    codes = (codes | codes << 4) & 0x0f0fu;
    return __byte_perm(levels, 0, (codes | codes << 2) & 0x3333u);
}
// Four bytes, none of them 0, negative where the lowest 4 bits say so.
__device__ __forceinline__ int negated(uint32_t bytes, uint32_t bits) {
    const uint32_t ones = spread(bits);
    return (int)((bytes ^ ones * 255) + ones);
}
// Seven bits of signs give eight, of which an even number is set.
__device__ __forceinline__ uint32_t even_signs(uint32_t code) { return (code & 127) | (__popc(code & 127) & 1) << 7; }
__device__ __forceinline__ float odd_step(const uint8_t* half, int s) { return load_half(half) * (float)(2 * s + 1); }
// Point j (of 8 weights) of a group.
__device__ __forceinline__ void place(Group& out, int j, uint32_t codes, uint32_t signs) {
    out.q[2 * j] = negated(four(LEVELS_2, codes), signs);
    out.q[2 * j + 1] = negated(four(LEVELS_2, codes >> 8), signs >> 4);
}
__device__ __forceinline__ void two_scales(Group& out, const uint8_t* d, int nibbles) {
    out.scale[0] = odd_step(d, nibbles & 15) * 0.125f, out.scale[1] = odd_step(d, nibbles >> 4) * 0.125f;
}

struct IQ2_XXS {
    DECODER(256, 66, 0) {
        SUPER(66);
        const uint8_t* run = b + 2 + 8 * part;
        const uint32_t word = load32_by16(run + 4);
        both(out.scale, odd_step(b, word >> 28) * 0.125f);
        EACH4 place(out, i, BOOK_IQ2XXS[run[i]], even_signs(word >> 7 * i));
        return out;
    }
};
struct IQ2_XS {
    DECODER(256, 74, 0) {
        SUPER(74);
        two_scales(out, b, b[66 + part]);
        EACH4 {
            const uint32_t word = load16(b + 2 + 8 * part + 2 * i);
            place(out, i, BOOK_IQ2XS[word & 511], even_signs(word >> 9));
        }
        return out;
    }
};
struct IQ2_S {
    DECODER(256, 82, 0) {
        SUPER(82);
        two_scales(out, b, b[74 + part]);
        EACH4 {
            const int index = b[2 + 4 * part + i] | (b[66 + part] >> 2 * i & 3) << 8;
            place(out, i, BOOK_IQ2S[index], b[34 + 4 * part + i]);
        }
        return out;
    }
};
struct IQ3_XXS {
    DECODER(256, 98, 0) {
        SUPER(98);
        const uint32_t word = load32_by16(b + 66 + 4 * part);
        both(out.scale, odd_step(b, word >> 28) * 0.25f);
        EACH8 {
            const uint32_t point = __byte_perm(LEVELS_3XXS, BOOK_IQ3XXS[b[2 + 8 * part + i]]);
            out.q[i] = negated(point, even_signs(word >> 7 * (i >> 1)) >> 4 * (i & 1));
        }
        return out;
    }
};
struct IQ3_S {
    DECODER(256, 110, 0) {
        SUPER(110);
        both(out.scale, odd_step(b, b[106 + (part >> 1)] >> 4 * (part & 1) & 15));
        EACH8 {
            const int index = b[2 + 8 * part + i] | (b[66 + part] >> i & 1) << 8;
            out.q[i] = negated(__byte_perm(LEVELS_3S, BOOK_IQ3S[index]), b[74 + 4 * part + (i >> 1)] >> 4 * (i & 1));
        }
        return out;
    }
};
__device__ __forceinline__ void place_ternary(Group& out, int j, uint32_t codes, bool down) {
    const uint32_t levels = down ? LEVELS_1_DOWN : LEVELS_1_UP;
    out.q[2 * j] = (int)four(levels, codes), out.q[2 * j + 1] = (int)four(levels, codes >> 8);
}
struct IQ1_S {
    DECODER(256, 50, 0) {
        SUPER(50);
        const uint32_t word = load16(b + 34 + 2 * part);
        both(out.scale, odd_step(b, word >> 12 & 7) * 0.125f);
        EACH4 place_ternary(out, i, BOOK_IQ1S[b[2 + 4 * part + i] | (word >> 3 * i & 7) << 8], word >> 15);
        return out;
    }
};
struct IQ1_M {
    DECODER(256, 56, 0) {
        SUPER(56);
        uint32_t bits = 0;  // of d, four in each word
        EACH4 bits |= load16(b + 48 + 2 * i) >> 12 << 4 * i;
        const float d = half_to_float((uint16_t)bits);
        const uint32_t scales = load16(b + 48 + 2 * (part >> 1)) >> 6 * (part & 1);
        out.scale[0] = d * (float)(2 * (scales & 7) + 1) * 0.125f;
        out.scale[1] = d * (float)(2 * (scales >> 3 & 7) + 1) * 0.125f;
        EACH4 {
            const uint32_t nibble = b[32 + 2 * part + (i >> 1)] >> 4 * (i & 1);
            place_ternary(out, i, BOOK_IQ1S[b[4 * part + i] | (nibble & 7) << 8], nibble >> 3 & 1);
        }
        return out;
    }
};

// Digit i (power = 3^i) of the base-3 fractions b / 256 of four bytes, less one: moe_ref/quants/ternary.py says why.
__device__ __forceinline__ int trits(uint32_t bytes, uint32_t power) {
    const uint32_t even = ((bytes & 0x00ff00ffu) * power & 0x00ff00ffu) * 3 >> 8 & 0x00030003u;
    const uint32_t odd = ((bytes >> 8 & 0x00ff00ffu) * power & 0x00ff00ffu) * 3 >> 8 & 0x00030003u;
    return less(even | odd << 8, 1);
}
__device__ __forceinline__ uint32_t power_of_3(int i) {
    return i == 0 ? 1 : i == 1 ? 3 : i == 2 ? 9 : i == 3 ? 27 : 81;
}
struct TQ1_0 {
    DECODER(256, 54, 0) {
        SUPER(54);
        both(out.scale, load_half(b + 52));
        EACH8 {  // elements 0..159: digits of 32 bytes; ..239: of 16; ..255: of 4
            const int word = 8 * part + i, late = word - 40, last = word - 60;
            const int at = word < 40 ? 4 * i : word < 60 ? 32 + 4 * (late & 3) : 48;
            out.q[i] = trits(load32_by16(b + at), power_of_3(word < 40 ? part : word < 60 ? late >> 2 : last));
        }
        return out;
    }
};
struct TQ2_0 {
    DECODER(256, 66, 0) {
        SUPER(66);
        both(out.scale, load_half(b + 64));
        EACH8 out.q[i] = less(load32_by16(b + 32 * h + 4 * i) >> 2 * p & 0x03030303u, 1);
        return out;
    }
};

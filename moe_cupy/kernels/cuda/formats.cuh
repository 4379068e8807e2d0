// The tensor formats of GGUF, 32 weights at a time: x[i] = scale[i / 16] * q[i] + offset[i / 16], q signed bytes.
// Byte layouts are drawn in moe_ref/quants. A row is at least as aligned as its format's widest field; blocks whose
// size is not a multiple of 4 are read in pieces of 2 (or, MXFP4, 1). load(row, g) decodes elements 32g..32g+31.
struct Group {
    int q[8];
    float scale[2], offset[2];
};
#define EACH8 for (int i = 0; i < 8; i++)
#define EACH4 for (int i = 0; i < 4; i++)
#define LOW4 0x0f0f0f0fu
#define DECODER(elements, bytes, has_offset)                                            \
    enum { BLOCK = elements, BYTES = bytes, QUANTIZED = 1, OFFSET = has_offset };        \
    static __device__ __forceinline__ Group load(const uint8_t* row, int g)

// Four bytes of 0..127 less k.
__device__ __forceinline__ int less(uint32_t bytes, uint32_t k) {
    return (int)(((bytes | 0x80808080u) - k * 0x01010101u) ^ 0x80808080u);
}
// The lowest 4 bits as bits 0 of 4 bytes.
__device__ __forceinline__ uint32_t spread(uint32_t bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }
// table[q] for 4 bytes q of 0..15; table is 16 signed bytes in 4 words.
__device__ __forceinline__ int lookup(uint32_t t0, uint32_t t1, uint32_t t2, uint32_t t3, uint32_t q) {
    uint32_t s = q & 0x07070707u;
    s = (s | s >> 4) & 0x00ff00ffu;
    s |= s >> 8;
    uint32_t upper = (q >> 3 & 0x01010101u) * 255;
    return (int)((__byte_perm(t0, t1, s & 0x7777) & ~upper) | (__byte_perm(t2, t3, s & 0x7777) & upper));
}
__device__ __forceinline__ int iq4_values(uint32_t q) {
    return lookup(0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u, q);  // -127 -104 ... 89 113
}
__device__ __forceinline__ int e2m1_values(uint32_t q) {
    return lookup(0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu, q);  // 0 1 2 3 4 6 8 12 and their negatives
}
__device__ __forceinline__ void both(float (&pair)[2], float x) { pair[0] = pair[1] = x; }

// Low nibbles of 16 bytes are elements 0..15, high nibbles 16..31.
#define NIBBLES(w, from, map_low, map_high)  \
    EACH4 {                                  \
        uint32_t w = (from);                 \
        out.q[i] = (int)(map_low);           \
        out.q[4 + i] = (int)(map_high);      \
    }

struct Q4_0 {
    DECODER(32, 18, 0) {
        const uint8_t* b = row + g * 18;
        Group out = {};
        both(out.scale, load_half(b));
        NIBBLES(w, load32_by16(b + 2 + 4 * i), less(w & LOW4, 8), less(w >> 4 & LOW4, 8))
        return out;
    }
    static __device__ __forceinline__ float value(const uint8_t* row, int i) {  // for the KV cache
        const uint8_t* b = row + (i >> 5) * 18;
        return load_half(b) * (float)((b[2 + (i & 15)] >> (i >> 2 & 4) & 15) - 8);
    }
};
struct Q4_1 {
    DECODER(32, 20, 1) {
        const uint8_t* b = row + g * 20;
        Group out;
        both(out.scale, load_half(b)), both(out.offset, load_half(b + 2));
        NIBBLES(w, load32(b + 4 + 4 * i), w & LOW4, w >> 4 & LOW4)
        return out;
    }
};
struct Q5_0 {
    DECODER(32, 22, 0) {
        const uint8_t* b = row + g * 22;
        Group out = {};
        both(out.scale, load_half(b));
        uint32_t fifth = load32_by16(b + 2);
        NIBBLES(w, load32_by16(b + 6 + 4 * i), less((w & LOW4) | spread(fifth >> 4 * i) << 4, 16),
                less((w >> 4 & LOW4) | spread(fifth >> (16 + 4 * i)) << 4, 16))
        return out;
    }
};
struct Q5_1 {
    DECODER(32, 24, 1) {
        const uint8_t* b = row + g * 24;
        Group out;
        both(out.scale, load_half(b)), both(out.offset, load_half(b + 2));
        uint32_t fifth = load32(b + 4);
        NIBBLES(w, load32(b + 8 + 4 * i), (w & LOW4) | spread(fifth >> 4 * i) << 4,
                (w >> 4 & LOW4) | spread(fifth >> (16 + 4 * i)) << 4)
        return out;
    }
};
struct Q8_0 {
    DECODER(32, 34, 0) {
        const uint8_t* b = row + g * 34;
        Group out = {};
        both(out.scale, load_half(b));
        EACH8 out.q[i] = (int)load32_by16(b + 2 + 4 * i);
        return out;
    }
    static __device__ __forceinline__ float value(const uint8_t* row, int i) {  // for the KV cache
        const uint8_t* b = row + (i >> 5) * 34;
        return load_half(b) * (float)(int8_t)b[2 + (i & 31)];
    }
};
struct IQ4_NL {
    DECODER(32, 18, 0) {
        const uint8_t* b = row + g * 18;
        Group out = {};
        both(out.scale, load_half(b));
        NIBBLES(w, load32_by16(b + 2 + 4 * i), iq4_values(w & LOW4), iq4_values(w >> 4 & LOW4))
        return out;
    }
};
struct MXFP4 {
    DECODER(32, 17, 0) {
        const uint8_t* b = row + g * 17;
        Group out = {};
        int e = b[0];  // half of 2^(e - 127): the values are doubled
        both(out.scale, __int_as_float(e < 2 ? 0x00200000 << e : (e - 1) << 23));
        NIBBLES(w, load32_by8(b + 1 + 4 * i), e2m1_values(w & LOW4), e2m1_values(w >> 4 & LOW4))
        return out;
    }
};
// Half of a float of 4 exponent and 3 fraction bits, the top bit ignored; 0x7f is 0.
__device__ __forceinline__ float half_e4m3(int code) {
    int e = code >> 3 & 15, f = code & 7;
    if (code == 127) return 0.f;
    return (float)(e ? 8 + f : f) * __int_as_float((117 + max(e, 1) - 1) << 23);  // steps of 2^-10, doubled by e
}
struct NVFP4 {
    DECODER(64, 36, 0) {
        const uint8_t* b = row + (g >> 1) * 36;
        Group out = {};
        for (int half = 0; half < 2; half++) {
            int sub = 2 * (g & 1) + half;
            out.scale[half] = half_e4m3(b[sub]);
            for (int i = 0; i < 2; i++) {
                uint32_t w = load32(b + 4 + 8 * sub + 4 * i);
                out.q[4 * half + i] = e2m1_values(w & LOW4);
                out.q[4 * half + 2 + i] = e2m1_values(w >> 4 & LOW4);
            }
        }
        return out;
    }
};

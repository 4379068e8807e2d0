// Formats in super-blocks of 256 (see formats.cuh): a factor d for the block, small integer scales for its parts.
// Group g of a row is part g % 8 of block g / 8; h and p say which half of the block, and which quarter of that.
#define SUPER(bytes)                             \
    const uint8_t* b = row + (g >> 3) * (bytes); \
    int part = g & 7, h = part >> 2, p = part & 3; \
    Group out = {};                              \
    (void)h, (void)p

struct Q2_K {
    DECODER(256, 84, 1) {
        SUPER(84);
        float d = load_half(b + 80), dmin = load_half(b + 82);
        for (int half = 0; half < 2; half++) {
            int s = b[2 * part + half];
            out.scale[half] = d * (float)(s & 15), out.offset[half] = -(dmin * (float)(s >> 4));
        }
        EACH8 out.q[i] = (int)(load32(b + 16 + 32 * h + 4 * i) >> 2 * p & 0x03030303u);
        return out;
    }
};
struct Q3_K {
    DECODER(256, 110, 0) {
        SUPER(110);
        float d = load_half(b + 108);
        for (int half = 0; half < 2; half++) {
            int s = 2 * part + half;
            int low = s < 8 ? b[96 + s] & 15 : b[88 + s] >> 4, top = b[104 + (s & 3)] >> 2 * (s >> 2) & 3;
            out.scale[half] = d * (float)((low | top << 4) - 32);
        }
        EACH8 {
            uint32_t low = load32_by16(b + 32 + 32 * h + 4 * i) >> 2 * p & 0x03030303u;
            uint32_t third = load32_by16(b + 4 * i) >> part & 0x01010101u;
            out.q[i] = less(low | third << 2, 4);
        }
        return out;
    }
};
// The 6-bit scale and min of part s, packed in 12 bytes (Q4_K, Q5_K).
__device__ __forceinline__ void scale_and_min(const uint8_t* packed, int s, int& scale, int& minimum) {
    if (s < 4) {
        scale = packed[s] & 63, minimum = packed[4 + s] & 63;
    } else {
        scale = (packed[4 + s] & 15) | packed[s - 4] >> 6 << 4;
        minimum = packed[4 + s] >> 4 | packed[s] >> 6 << 4;
    }
}
__device__ __forceinline__ void affine(Group& out, const uint8_t* b, int part) {
    int scale, minimum;
    scale_and_min(b + 4, part, scale, minimum);
    both(out.scale, load_half(b) * (float)scale), both(out.offset, -(load_half(b + 2) * (float)minimum));
}
struct Q4_K {
    DECODER(256, 144, 1) {
        SUPER(144);
        affine(out, b, part);
        EACH8 out.q[i] = (int)(load32(b + 16 + 32 * (part >> 1) + 4 * i) >> 4 * (part & 1) & LOW4);
        return out;
    }
};
struct Q5_K {
    DECODER(256, 176, 1) {
        SUPER(176);
        affine(out, b, part);
        EACH8 {
            uint32_t low = load32(b + 48 + 32 * (part >> 1) + 4 * i) >> 4 * (part & 1) & LOW4;
            out.q[i] = (int)(low | (load32(b + 16 + 4 * i) >> part & 0x01010101u) << 4);
        }
        return out;
    }
};
struct Q6_K {
    DECODER(256, 210, 0) {
        SUPER(210);
        float d = load_half(b + 208);
        out.scale[0] = d * (float)(int8_t)b[192 + 2 * part], out.scale[1] = d * (float)(int8_t)b[193 + 2 * part];
        EACH8 {
            uint32_t low = load32_by16(b + 64 * h + 32 * (p & 1) + 4 * i) >> 4 * (p >> 1) & LOW4;
            uint32_t top = load32_by16(b + 128 + 32 * h + 4 * i) >> 2 * p & 0x03030303u;
            out.q[i] = less(low | top << 4, 32);
        }
        return out;
    }
};
struct IQ4_XS {
    DECODER(256, 136, 0) {
        SUPER(136);
        int low = b[4 + (part >> 1)] >> 4 * (part & 1) & 15, top = (int)load16(b + 2) >> 2 * part & 3;
        both(out.scale, load_half(b) * (float)((low | top << 4) - 32));
        NIBBLES(w, load32(b + 8 + 16 * part + 4 * i), iq4_values(w & LOW4), iq4_values(w >> 4 & LOW4))
        return out;
    }
};

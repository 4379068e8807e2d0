// Rows of a matrix of any format: one element, and dot products of 32 elements with activations.
struct F32 {
    enum { BLOCK = 1, BYTES = 4, QUANTIZED = 0 };
    static __device__ __forceinline__ float value(const uint8_t* row, int i) { return ((const float*)row)[i]; }
};
struct F16 {
    enum { BLOCK = 1, BYTES = 2, QUANTIZED = 0 };
    static __device__ __forceinline__ float value(const uint8_t* row, int i) { return load_half(row + 2 * i); }
};
struct BF16 {
    enum { BLOCK = 1, BYTES = 2, QUANTIZED = 0 };
    static __device__ __forceinline__ float value(const uint8_t* row, int i) {
        return __int_as_float((int)(load16(row + 2 * i) << 16));
    }
};

template <class F> __device__ __forceinline__ long long row_bytes(int cols) {
    return (long long)(cols / F::BLOCK) * F::BYTES;
}
// Element i of a decoded group, to the bit what moe_ref decodes.
template <class F> __device__ __forceinline__ float element(const Group& g, int i) {
    float x = __fmul_rn(g.scale[i >> 4], (float)(int8_t)(g.q[i >> 2] >> 8 * (i & 3)));
    return F::OFFSET ? __fadd_rn(x, g.offset[i >> 4]) : x;
}

template <class F, bool quantized = F::QUANTIZED> struct Rows {
    // Elements first..first+31 of a row of plain numbers, as far as there are.
    static __device__ __forceinline__ float dot(const uint8_t* row, int g, int cols, const float* x) {
        float sum = 0.f;
#pragma unroll 8
        for (int i = 32 * g; i < min(32 * g + 32, cols); i++) sum += F::value(row, i) * x[i];
        return sum;
    }
    // The same elements to out[0], out[step], ...
    static __device__ __forceinline__ void decode(const uint8_t* row, int g, int cols, float* out, int step) {
        for (int i = 0; i < min(32, cols - 32 * g); i++) out[i * step] = F::value(row, 32 * g + i);
    }
};
template <class F> struct Rows<F, true> {
    static __device__ __forceinline__ float dot(const uint8_t* row, int g, int, const float* x) {
        const Group w = F::load(row, g);
        const float4* x4 = (const float4*)(x + 32 * g);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 a = x4[i];
            sum += element<F>(w, 4 * i) * a.x + element<F>(w, 4 * i + 1) * a.y;
            sum += element<F>(w, 4 * i + 2) * a.z + element<F>(w, 4 * i + 3) * a.w;
        }
        return sum;
    }
    static __device__ __forceinline__ float dot(const uint8_t* row, int g, int, const Q8* x) {
        const Group w = F::load(row, g);
        const Q8& a = x[g];
        int low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            low = __dp4a(w.q[i], a.q[i], low);
            high = __dp4a(w.q[4 + i], a.q[4 + i], high);
        }
        float sum = w.scale[0] * (float)low + w.scale[1] * (float)high;
        if (F::OFFSET) sum += w.offset[0] * (float)a.sum[0] + w.offset[1] * (float)a.sum[1];
        return a.d * sum;
    }
    static __device__ __forceinline__ void decode(const uint8_t* row, int g, int, float* out, int step) {
        const Group w = F::load(row, g);
#pragma unroll
        for (int i = 0; i < 32; i++) out[i * step] = element<F>(w, i);
    }
};

// A warp's dot product of a row with x (float or Q8): every lane takes every 32nd group of 32, every lane gets the sum.
template <class F, class X> __device__ __forceinline__ float row_dot(const uint8_t* row, int cols, const X* x) {
    float sum = 0.f;
    for (int g = lane_id(); g < (cols + 31) / 32; g += 32) sum += Rows<F>::dot(row, g, cols, x);
    return warp_sum(sum);
}

// Prepended to the text of every kernel file: types, half precision, loads, reductions. No system header is needed.
// Conventions of all kernels: blocks are one-dimensional, whole warps, at most 256 threads; no thread leaves before
// the last barrier; all shared memory is dynamic; row-major arrays, shapes in comments; axes as in the project's docs.
#ifdef __CUDACC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
extern __shared__ __align__(16) unsigned char dynamic_shared[];
#define SHARED(T, name) T* name = (T*)dynamic_shared
__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("{ .reg .b16 t; mov.b16 t, %1; cvt.f32.f16 %0, t; }" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ uint16_t float_to_half(float x) {
    uint16_t bits;
    asm("{ .reg .b16 t; cvt.rn.f16.f32 t, %1; mov.b16 %0, t; }" : "=h"(bits) : "f"(x));
    return bits;
}
// c += a b by the tensor cores: 16 x 16 times 16 x 8 signed bytes, all lanes of a warp together. Lane 4r + t gives
// bytes 4t..4t+3 of rows r and r + 8 of a and of column r of b, and has columns 2t and 2t + 1 of both rows of c (PTX
// ISA, m16n8k16). Compute capability 7.5 has half of it, m8n8k16; from 10.0 on that becomes a whole one, half empty.
__device__ __forceinline__ void mma_16x8x16(int (&c)[4], const int (&a)[2], int b) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b));
#else
    for (int m = 0; m < 2; m++)
        asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                     : "+r"(c[2 * m]), "+r"(c[2 * m + 1]) : "r"(a[m]), "r"(b));
#endif
}
#endif

#define FULL 0xffffffffu
#ifndef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 80  // at most, so that a multiprocessor holds 768 threads
#endif
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(256, 65536 / 256 / REGISTERS_PER_THREAD) name
#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define FORMAT_KERNEL(name) KERNEL(JOIN(name, FORMAT))  // one kernel for each tensor type, e.g. gemv_Q4_K
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }
__device__ __forceinline__ int warp_count() { return blockDim.x / 32; }

__device__ __forceinline__ uint32_t load16(const uint8_t* p) { return *(const uint16_t*)p; }
__device__ __forceinline__ uint32_t load32(const uint8_t* p) { return *(const uint32_t*)p; }
__device__ __forceinline__ uint32_t load32_by16(const uint8_t* p) { return load16(p) | load16(p + 2) << 16; }
__device__ __forceinline__ uint32_t load32_by8(const uint8_t* p) {
    return p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}
// The nearest number with the upper 16 bits of a float, ties to even; a NaN stays one.
__device__ __forceinline__ uint16_t float_to_bfloat(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
__device__ __forceinline__ float load_half(const uint8_t* p) { return half_to_float(*(const uint16_t*)p); }

// Every lane gets the result; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float x) {
    for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int m = 16; m > 0; m >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, m));
    return x;
}
// The largest magnitude; NaN if there is one: without a sign, floats are ordered like their bits, and NaN is on top.
__device__ __forceinline__ float warp_largest(float x) {
    int bits = __float_as_int(x) & 0x7fffffff;
    for (int m = 16; m > 0; m >>= 1) bits = max(bits, __shfl_xor_sync(FULL, bits, m));
    return __int_as_float(bits);
}
// x, or NaN where it is infinite, which a limit or a softmax could turn into an ordinary number.
__device__ __forceinline__ float nan_unless_finite(float x) { return fabsf(x) < INFINITE ? x : NOT_A_NUMBER; }
// Every thread gets the result; scratch holds one float for each warp and may be used again at once.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    float total = 0.f;
    for (int i = 0; i < warp_count(); i++) total += scratch[i];
    __syncthreads();
    return total;
}

// Of two candidates the larger value, ties to the lower index; a NaN never wins against a number.
struct Best {
    float value;
    int index;
};
__device__ __forceinline__ Best better(Best a, Best b) {
    bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
    return second ? b : a;
}
__device__ __forceinline__ Best warp_best(Best x) {
    for (int m = 16; m > 0; m >>= 1) {
        Best other = {__shfl_xor_sync(FULL, x.value, m), __shfl_xor_sync(FULL, x.index, m)};
        x = better(x, other);
    }
    return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// 32 activations as signed bytes: x = d * q; sums of q over each half, for formats whose weights have offsets.
struct Q8 {
    float d;
    int16_t sum[2];
    int q[8];
};

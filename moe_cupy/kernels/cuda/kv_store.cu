__device__ __forceinline__ uint16_t nan_unless_finite_half(uint16_t x) { return (x & 0x7c00) == 0x7c00 ? 0x7e00 : x; }

// cache[rows[t], column : column + width] = x[t, :]: keys or values of new positions into the KV cache.
// What is not finite, or too large for the type, is NaN there: a score of minus infinity would hide it.
// cache [*, cache_stride] f32 (kind 0), f16 (1) or bf16 (2); x f32 [T, width] x_stride apart; rows int32 [T]. A thread each,
// grid (ceil(width / block), T); no shared memory. Bytes: 6 or 8 a number; launch-bound. Called for k and for v.
KERNEL(kv_store)(uint8_t* cache, const float* x, const int* rows, int width, int x_stride, int cache_stride,
                 int column, int kind) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const long long at = (long long)rows[blockIdx.y] * cache_stride + column + i;
    const float value = nan_unless_finite(x[(long long)blockIdx.y * x_stride + i]);
    if (kind == 1)
        ((uint16_t*)cache)[at] = nan_unless_finite_half(float_to_half(value));
    else if (kind == 2)
        ((uint16_t*)cache)[at] = float_to_bfloat(value);
    else
        ((float*)cache)[at] = value;
}

// The same into a cache of Q8_0 blocks: d = half(max |x| / 127), q = x / d before d was rounded, to the nearest, halves
// away from zero, as ggml has it. column, width and both strides are multiples of 32; cache rows cache_stride numbers
// apart. A warp for each block, grid (ceil(width / 32 / warps), T); no shared memory.
KERNEL(kv_store_q8_0)(uint8_t* cache, const float* x, const int* rows, int width, int x_stride, int cache_stride,
                      int column) {
    const int g = blockIdx.x * warp_count() + warp_id(), lane = lane_id();
    if (32 * g >= width) return;  // the whole warp
    const float value = x[(long long)blockIdx.y * x_stride + 32 * g + lane], d = warp_largest(value) / 127.f;
    uint8_t* block = cache + ((long long)rows[blockIdx.y] * (cache_stride / 32) + column / 32 + g) * 34;
    if (lane == 0) *(uint16_t*)block = nan_unless_finite_half(float_to_half(d));
    block[2 + lane] = d > 0.f && d < INFINITE ? (uint8_t)(int)roundf(value * (1.f / d)) : 0;
}

// The same into a cache of Q4_0 blocks: d = m / -8 with m the first of the largest magnitude, q = x / d + 8.5 cut to a
// whole number, at most 15; number i shares a byte with number i + 16.
KERNEL(kv_store_q4_0)(uint8_t* cache, const float* x, const int* rows, int width, int x_stride, int cache_stride,
                      int column) {
    const int g = blockIdx.x * warp_count() + warp_id(), lane = lane_id();
    if (32 * g >= width) return;  // the whole warp
    const float value = x[(long long)blockIdx.y * x_stride + 32 * g + lane];
    const Best most = warp_best({fabsf(value), lane});
    const bool finite = warp_largest(value) < INFINITE;
    const float d = finite ? __shfl_sync(FULL, value, most.index) / -8.f : NOT_A_NUMBER, inverse = d != 0.f ? 1.f / d : 0.f;
    const int q = finite ? min(15, (int)__fadd_rn(__fmul_rn(value, inverse), 8.5f)) : 0;
    const int upper = __shfl_xor_sync(FULL, q, 16);
    uint8_t* block = cache + ((long long)rows[blockIdx.y] * (cache_stride / 32) + column / 32 + g) * 18;
    if (lane == 0) *(uint16_t*)block = nan_unless_finite_half(float_to_half(d));
    if (lane < 16) block[2 + lane] = (uint8_t)(q | upper << 4);
}

// cache[rows[t], column : column + width] = x[t, :]: keys or values of new positions into the KV cache.
// cache f32 or (is_half) f16 [*, cache_stride], x f32 [T, width] x_stride apart, rows int32 [T]. One thread a number,
// grid (ceil(width / block), T); no shared memory. Bytes: 6 or 8 a number; launch-bound. Called for k and for v.
KERNEL(kv_store)(uint8_t* cache, const float* x, const int* rows, int width, int x_stride, int cache_stride,
                 int column, int is_half) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const long long at = (long long)rows[blockIdx.y] * cache_stride + column + i;
    const float value = x[(long long)blockIdx.y * x_stride + i];
    if (is_half)
        ((uint16_t*)cache)[at] = float_to_half(value);
    else
        ((float*)cache)[at] = value;
}

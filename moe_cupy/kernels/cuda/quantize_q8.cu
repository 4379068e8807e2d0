// q = rint(x / d) with d = max |x| / 127 over 32 activations: what dp4a kernels take (Q8 of prelude.cuh, 40 bytes). d is
// NaN or infinite where one of them is, and with it every product.
// out Q8 [n_groups], x f32 [32 n_groups]. grid ceil(n_groups / warps): a warp for each group; no shared memory.
// Bytes: 168 a group. Called once for each vector that meets a quantized matrix; a few microseconds, launch-bound.
KERNEL(quantize_q8)(Q8* out, const float* x, int n_groups) {
    const int g = blockIdx.x * warp_count() + warp_id(), lane = lane_id();
    if (g >= n_groups) return;  // the whole warp
    const float value = x[32 * (long long)g + lane];
    const float d = warp_largest(value) / 127.f;
    const int q = d > 0.f ? __float2int_rn(value / d) : 0;
    int sum = q;
    for (int m = 8; m > 0; m >>= 1) sum += __shfl_xor_sync(FULL, sum, m);  // of the lane's half
    if (lane == 0) out[g].d = d;
    if (lane % 16 == 0) out[g].sum[lane / 16] = (int16_t)sum;
    ((int8_t*)out[g].q)[lane] = (int8_t)q;
}

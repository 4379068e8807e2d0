// out[t, d] (+)= sum over r of weight[t, r] (scale[e] down[d] . h[t, r] + bias[e, d]), e the r-th expert of token t:
// the second half of all chosen experts and their weighted sum in one launch, in rank order, so that it is repeatable.
// out f32 [T, D]; h [T, used, F] f32, or Q8 blocks (_q8); down_of: addresses of [D, F] matrices by slot; slot_of, ids
// int32 [T, used], a negative slot is left out of the sum; weights f32 [T, used] or null (all 1); bias f32 [E, D] and
// scale f32 [E] or null. grid (ceil(D / warps), T): a warp for each d; no shared memory.
// Bytes: used D row_bytes(F); FLOPs 2 T used D F. Memory-bound: expected at 50-70 % of the copy bandwidth, for F is
// small: with F = 768 only 24 of 32 lanes have a group. Called once a MoE layer, after expert_gate_up.
template <class X> __device__ __forceinline__ void down_rows(
    float* out, const X* h, const uint8_t* const* down_of, const int* slot_of, const int* ids, const float* weights,
    const float* bias, const float* scale, int width, int cols, int used, int add) {
    const int d = blockIdx.x * warp_count() + warp_id();
    if (d >= width) return;  // the whole warp
    float total = 0.f;
    for (int r = 0; r < used; r++) {
        const int pair = blockIdx.y * used + r, slot = slot_of[pair], e = ids[pair];
        if (slot < 0) continue;
        const X* x = h + (long long)pair * (sizeof(X) == 4 ? cols : cols / 32);
        float y = row_dot<FORMAT>(down_of[slot] + d * row_bytes<FORMAT>(cols), cols, x);
        if (scale) y *= scale[e];
        if (bias) y += bias[(long long)e * width + d];
        total += weights ? weights[pair] * y : y;
    }
    float* where = out + (long long)blockIdx.y * width + d;
    if (lane_id() == 0) *where = add ? *where + total : total;
}

FORMAT_KERNEL(expert_down)(float* out, const float* h, const uint8_t* const* down_of, const int* slot_of,
                           const int* ids, const float* weights, const float* bias, const float* scale, int width,
                           int cols, int used, int add) {
    down_rows(out, h, down_of, slot_of, ids, weights, bias, scale, width, cols, used, add);
}
#ifdef QUANTIZED
FORMAT_KERNEL(expert_down_q8)(float* out, const Q8* h, const uint8_t* const* down_of, const int* slot_of,
                              const int* ids, const float* weights, const float* bias, const float* scale, int width,
                              int cols, int used, int add) {
    down_rows(out, h, down_of, slot_of, ids, weights, bias, scale, width, cols, used, add);
}
#endif

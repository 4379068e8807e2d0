// h[t, r, f] = act(s gate[f] . x[t] + bias, s up[f] . x[t] + bias) for the r-th expert of token t: the first half of
// all chosen experts in one launch, through the addresses of the slots that hold them.
// h f32 [T, used, F]; x [T, D] f32, or Q8 blocks (_q8); gate_of, up_of: addresses of [F, D] matrices by slot (rows of
// a fused matrix: up = gate + F rows); slot_of int32 [T, used], negative: not here, h is left alone; ids int32
// [T, used] experts, for the biases f32 [E, F] and scales f32 [E]; input_weights f32 [T, used]: multiply x; each may
// be null.
// grid (ceil(F / warps), used, T): a warp for each f; no shared memory. Bytes: 2 used F row_bytes(D); FLOPs 4 T used F D.
// Memory-bound, the largest reader of a decoded token: expected at 60-80 % of the copy bandwidth. A dense network is
// one expert in slot 0. Called once a MoE layer when all slots of the launch are filled.
template <class X> __device__ __forceinline__ void gate_up_rows(
    float* h, const X* x, const uint8_t* const* gate_of, const uint8_t* const* up_of, const int* slot_of,
    const int* ids, const float* gate_bias, const float* up_bias, const float* gate_scale, const float* up_scale,
    const float* input_weights, int width, int cols, int activation) {
    const int f = blockIdx.x * warp_count() + warp_id(), pair = blockIdx.z * gridDim.y + blockIdx.y;
    const int slot = slot_of[pair];
    if (f >= width || slot < 0) return;  // the whole warp
    const long long at = f * row_bytes<FORMAT>(cols), of_expert = (long long)ids[pair] * width + f;
    x += (long long)blockIdx.z * (sizeof(X) == 4 ? cols : cols / 32);
    float gate = row_dot<FORMAT>(gate_of[slot] + at, cols, x), up = row_dot<FORMAT>(up_of[slot] + at, cols, x);
    if (input_weights) gate *= input_weights[pair], up *= input_weights[pair];
    if (gate_scale) gate *= gate_scale[ids[pair]];
    if (up_scale) up *= up_scale[ids[pair]];
    if (gate_bias) gate += gate_bias[of_expert];
    if (up_bias) up += up_bias[of_expert];
    if (lane_id() == 0) h[(long long)pair * width + f] = gated(activation, gate, up);
}

FORMAT_KERNEL(expert_gate_up)(float* h, const float* x, const uint8_t* const* gate_of, const uint8_t* const* up_of,
                              const int* slot_of, const int* ids, const float* gate_bias, const float* up_bias,
                              const float* gate_scale, const float* up_scale, const float* input_weights, int width,
                              int cols, int activation) {
    gate_up_rows(h, x, gate_of, up_of, slot_of, ids, gate_bias, up_bias, gate_scale, up_scale, input_weights, width,
                 cols, activation);
}
#ifdef QUANTIZED
FORMAT_KERNEL(expert_gate_up_q8)(float* h, const Q8* x, const uint8_t* const* gate_of, const uint8_t* const* up_of,
                                 const int* slot_of, const int* ids, const float* gate_bias, const float* up_bias,
                                 const float* gate_scale, const float* up_scale, const float* input_weights, int width,
                                 int cols, int activation) {
    gate_up_rows(h, x, gate_of, up_of, slot_of, ids, gate_bias, up_bias, gate_scale, up_scale, input_weights, width,
                 cols, activation);
}
#endif

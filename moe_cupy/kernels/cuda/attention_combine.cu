// o[t, h] = sum over parts of o_part exp(top_part - top) / sum of their totals; second half of attention_decode.
// out f32 [T, H, V], partial f32 [T, H, splits, V + 2], sinks f32 [H] or null: a logit that takes its share of the
// softmax and carries no value. grid (H, T); no shared memory. Bytes: 4 splits (V + 2) a head; launch-bound.
KERNEL(attention_combine)(float* out, const float* partial, const float* sinks, int splits, int v_width) {
    const long long pair = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    const float* parts = partial + pair * splits * (v_width + 2);
    float top = sinks ? sinks[blockIdx.x] : -INFINITE;
    for (int s = 0; s < splits; s++) top = fmaxf(top, parts[s * (v_width + 2) + v_width]);
    float total = sinks ? expf(nan_unless_finite(sinks[blockIdx.x]) - top) : 0.f;
    for (int s = 0; s < splits; s++) {
        const float* part = parts + s * (v_width + 2) + v_width;
        if (part[0] > -INFINITE) total += part[1] * expf(part[0] - top);
    }
    for (int i = threadIdx.x; i < v_width; i += blockDim.x) {
        float sum = 0.f;
        for (int s = 0; s < splits; s++) {
            const float* part = parts + s * (v_width + 2);
            if (part[v_width] > -INFINITE) sum += part[i] * expf(part[v_width] - top);
        }
        out[pair * v_width + i] = sum / total;
    }
}

// o[t, h] = softmax(scale q.k) v for many queries: key and value rows come once to shared memory for several queries.
// out f32 [T, H, V]; the other parameters as in attention_decode, with sinks f32 [H] or null. A warp for each query:
// grid (ceil(T / warps), H). `tile` positions at a time, 32, 16, 8 or 4: the launch takes as many as fit into 48 KB.
// 32 / tile lanes share a score, each a part of K. Key rows lie K rounded up to 32, plus 32 / tile, floats apart, so
// that the lanes of a warp meet 32 banks. Where v == k and G = 1 (MLA), values are read from the keys' tile.
// Shared f32: warps (K + 32) + tile (stride + V, or no V for MLA). V <= 512; K = 576, V = 512 take tiles of 16.
// Bytes: S (K + V) for each head and `warps` queries; FLOPs 2 T S H (K + V). Compute-bound on FMA pipes, at perhaps a
// third of their peak: a lane reads two floats of shared memory for each product. Called once a layer for a prompt.
FORMAT_KERNEL(attention_prefill)(float* out, const float* q, const uint8_t* k, const uint8_t* v, const float* sinks,
                                 const int* positions, int n_tokens, int groups, int k_width, int v_width,
                                 int k_stride, int v_stride, int ring, float scale, float softcap, int window,
                                 int chunk, int tile) {
    SHARED(float, shared);
    const int heads = gridDim.y, head = blockIdx.y, group = head / (heads / groups), lane = lane_id();
    const int t = blockIdx.x * warp_count() + warp_id(), last_t = min(n_tokens, (int)(blockIdx.x + 1) * warp_count());
    const int sharers = 32 / tile, key_step = (k_width + 31) / 32 * 32 + sharers, my_key = lane % tile;
    const bool one_row = groups == 1 && k == v;
    float* query = shared + warp_id() * (k_width + 32);
    float* weights = query + k_width;
    float* keys = shared + warp_count() * (k_width + 32);
    float* values = one_row ? keys : keys + tile * key_step;
    const int value_step = one_row ? key_step : v_width;

    int begins = 0x7fffffff, ends = 0;  // what any query of the block sees
    for (int i = blockIdx.x * warp_count(); i < last_t; i++) {
        begins = min(begins, first_seen(positions[i], window, chunk));
        ends = max(ends, positions[i] + 1);
    }
    const int mine = t < n_tokens ? positions[t] : -1, first = t < n_tokens ? first_seen(mine, window, chunk) : 0;
    const long long pair = (long long)t * heads + head;
    if (t < n_tokens)
        for (int i = lane; i < k_width; i += 32) query[i] = nan_unless_finite(q[pair * k_width + i]);

    Mixed mixed;
    begin(mixed);
    for (int base = begins; base < ends; base += tile) {
        const int count = min(tile, ends - base);
        __syncthreads();
        for (int i = threadIdx.x; i < count * k_width; i += blockDim.x) {
            const long long row = (long long)((base + i / k_width) % ring) * k_stride + group * k_width;
            keys[i / k_width * key_step + i % k_width] = FORMAT::value(k + row / FORMAT::BLOCK * FORMAT::BYTES, i % k_width);
        }
        for (int i = threadIdx.x; i < (one_row ? 0 : count * v_width); i += blockDim.x) {
            const long long row = (long long)((base + i / v_width) % ring) * v_stride + group * v_width;
            values[i] = FORMAT::value(v + row / FORMAT::BLOCK * FORMAT::BYTES, i % v_width);
        }
        __syncthreads();
        const bool seen = base + my_key >= first && base + my_key <= mine;
        float sum = 0.f;
        if (seen) {
#pragma unroll 4
            for (int i = lane / tile; i < k_width; i += sharers) sum += query[i] * keys[my_key * key_step + i];
        }
        for (int m = tile; m < 32; m *= 2) sum += __shfl_xor_sync(FULL, sum, m);
        weights[lane] = weigh(mixed, seen && lane < tile ? capped(sum * scale, softcap) : -INFINITE);
        __syncwarp();
        for (int j = 0; j < count; j++) {
            const float p = weights[j];
            if (p == 0.f) continue;  // the whole warp
#pragma unroll
            for (int i = 0; i < MIX_WIDTH && 32 * i < v_width; i++)
                if (lane + 32 * i < v_width) mixed.o[i] += p * values[j * value_step + lane + 32 * i];
        }
    }

    float total = warp_sum(mixed.total);
    if (t >= n_tokens) return;
    const float top = sinks ? fmaxf(mixed.top, sinks[head]) : mixed.top, fade = expf(mixed.top - top);
    total = total * fade + (sinks ? expf(nan_unless_finite(sinks[head]) - top) : 0.f);
#pragma unroll
    for (int i = 0; i < MIX_WIDTH; i++)
        if (lane + 32 * i < v_width) out[pair * v_width + lane + 32 * i] = mixed.o[i] * fade / total;
}

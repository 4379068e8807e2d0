// o[t, h] = softmax(scale q.k) v over the positions that query t sees; first half: partial results of `splits` parts.
// partial f32 [T, H, splits, V + 2]: unnormalised o, then the part's largest score and its sum of exponentials.
// q f32 [T, H, K]; k and v: cache rows k_stride and v_stride elements apart, type FORMAT (F32, F16, Q8_0: K and V in whole blocks), KV head g at g K and g V
// (MLA: one KV head, v == k, V <= K); positions int32 [T]; position p lies in row p % ring. window, chunk, softcap: 0
// is none. grid (splits, H, T); shared f32: K + warps (32 + V + 2). V <= 512.
// A lane scores one of 32 positions, then the lanes share the value rows. Bytes: S (K + V) of the cache for each head
// (heads of a group share through L2); FLOPs 2 S H (K + V). Expected at half of the bandwidth: the lanes of a warp
// read 32 key rows at once, each line whole but not in one instruction. Called once a layer for each decoded token.
FORMAT_KERNEL(attention_decode)(float* partial, const float* q, const uint8_t* k, const uint8_t* v,
                                const int* positions, int groups, int k_width, int v_width, int k_stride,
                                int v_stride, int ring, float scale, float softcap, int window, int chunk) {
    SHARED(float, shared);
    const int splits = gridDim.x, heads = gridDim.y, head = blockIdx.y, lane = lane_id(), warp = warp_id();
    const long long pair = (long long)blockIdx.z * heads + head;
    const int group = head / (heads / groups), position = positions[blockIdx.z];
    const int first = first_seen(position, window, chunk), n_seen = position - first + 1;
    float* query = shared;
    float* weights = shared + k_width + 32 * warp;
    float* merge = shared + k_width + 32 * warp_count();
    for (int i = threadIdx.x; i < k_width; i += blockDim.x) query[i] = nan_unless_finite(q[pair * k_width + i]);
    __syncthreads();

    Mixed mixed;
    begin(mixed);
    const int tiles = (n_seen + 31) / 32, per_split = (tiles + splits - 1) / splits;
    const int last_tile = min(tiles, (int)(blockIdx.x + 1) * per_split);
    for (int tile = blockIdx.x * per_split + warp; tile < last_tile; tile += warp_count()) {
        const int base = first + 32 * tile, count = min(32, n_seen - 32 * tile);
        float score = -INFINITE;
        if (lane < count) {
            const long long row = (long long)((base + lane) % ring) * k_stride + group * k_width;
            const uint8_t* key = k + row / FORMAT::BLOCK * FORMAT::BYTES;
            float sum = 0.f;
#pragma unroll 4
            for (int i = 0; i < k_width; i++) sum += query[i] * FORMAT::value(key, i);
            score = capped(sum * scale, softcap);
        }
        weights[lane] = weigh(mixed, score);
        __syncwarp();
        for (int j = 0; j < count; j++) {
            const long long row = (long long)((base + j) % ring) * v_stride + group * v_width;
            const uint8_t* value = v + row / FORMAT::BLOCK * FORMAT::BYTES;
            const float p = weights[j];
#pragma unroll
            for (int i = 0; i < MIX_WIDTH && 32 * i < v_width; i++)
                if (lane + 32 * i < v_width) mixed.o[i] += p * FORMAT::value(value, lane + 32 * i);
        }
        __syncwarp();
    }

    const float total = warp_sum(mixed.total);
    float* mine = merge + warp * (v_width + 2);
#pragma unroll
    for (int i = 0; i < MIX_WIDTH; i++)
        if (lane + 32 * i < v_width) mine[lane + 32 * i] = mixed.o[i];
    if (lane == 0) mine[v_width] = mixed.top, mine[v_width + 1] = total;
    __syncthreads();
    float top = -INFINITE;
    for (int w = 0; w < warp_count(); w++) top = fmaxf(top, merge[w * (v_width + 2) + v_width]);
    float* out = partial + (pair * splits + blockIdx.x) * (v_width + 2);
    for (int i = threadIdx.x; i < v_width + 2; i += blockDim.x) {
        float sum = 0.f;
        for (int w = 0; w < warp_count(); w++) {
            const float* part = merge + w * (v_width + 2);
            if (part[v_width] > -INFINITE) sum += part[i] * expf(part[v_width] - top);
        }
        out[i] = i == v_width ? top : sum;
    }
}

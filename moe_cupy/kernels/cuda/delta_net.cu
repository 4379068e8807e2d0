// Gated delta net: the recurrent layers of qwen3next and qwen35moe. Three kernels, in the order of their use.

// out[t, c] = silu(sum over j of kernel[c, j] * input[t - C + 1 + j, c]); the inputs before the first are `before`.
// out and x f32 [T, channels]; before f32 [C - 1, channels], after: the last C - 1 inputs, may be the same array;
// kernel f32 [channels, C].
// A thread for a channel, grid ceil(channels / block); no shared memory; C <= 8. Bytes: 8 T channels; memory-bound.
KERNEL(delta_convolve)(float* out, const float* x, const float* before, float* after, const float* kernel,
                       int n_tokens, int channels, int taps) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= channels) return;
    float seen[8] = {};  // seen[j]: the input j - C + 1 tokens from here
#pragma unroll
    for (int j = 0; j < 7; j++)
        if (j + 1 < taps) seen[j + 1] = before[j * channels + c];
    for (int t = 0; t < n_tokens; t++) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 7; j++)
            if (j + 1 < taps) seen[j] = seen[j + 1];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (j + 1 == taps) seen[j] = x[(long long)t * channels + c];
            if (j < taps) sum += seen[j] * kernel[c * taps + j];
        }
        out[(long long)t * channels + c] = sum * sigmoid(sum);
    }
#pragma unroll
    for (int j = 0; j < 7; j++)
        if (j + 1 < taps) after[j * channels + c] = seen[j + 1];
}

// fade = exp(softplus(alpha + dt) * a), beta = sigmoid(beta), in place: alpha and beta f32 [T, heads]; dt, a f32 [heads].
// One thread a number, grid ceil(T heads / block); no shared memory; launch-bound.
KERNEL(delta_gates)(float* alpha, float* beta, const float* dt, const float* a, int heads, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float x = nan_unless_finite(alpha[i] + dt[i % heads]);
    alpha[i] = expf(nan_unless_finite((fmaxf(x, 0.f) + log1pf(expf(-fabsf(x)))) * a[i % heads]));
    beta[i] = sigmoid(nan_unless_finite(beta[i]));
}

// For each token: S <- fade S; S <- S + k (v - k.S) beta; out = q.S / sqrt(width), q and k brought to length one.
// out f32 [T, heads, width]; mixed f32 [T, channels]: q and k of key_heads heads each, then v of heads heads, side by
// side; value head h has key head h % key_heads if tiled, else h / (heads / key_heads); fade and beta f32 [T, heads];
// before and after f32 [heads, width, width] (key, value), may be the same. A block for 32 value features of a head, its warps share the keys:
// grid (ceil(width / 32), heads); shared f32: 34 width + 32 warps. Bytes: 8 width^2 heads + 16 T heads width; FLOPs
// 9 T heads width^2. A chain of T steps of 9 barriers: latency-bound, perhaps 2 us a step.
KERNEL(delta_recur)(float* out, const float* mixed, const float* fade, const float* beta, const float* before,
                    float* after, int n_tokens, int heads, int key_heads, int width, float epsilon, int tiled) {
    SHARED(float, state);  // [width, 32]
    float* key = state + 32 * width;
    float* query = key + width;
    float* parts = query + width;
    const int head = blockIdx.y, lane = lane_id(), warp = warp_id(), warps = warp_count();
    const int feature = 32 * blockIdx.x + lane, key_head = tiled ? head % key_heads : head / (heads / key_heads);
    const bool inside = feature < width;
    const long long column = (long long)head * width * width + feature;
    for (int i = warp; i < width; i += warps) state[32 * i + lane] = inside ? before[column + (long long)i * width] : 0.f;
    for (int t = 0; t < n_tokens; t++) {
        const float* q = mixed + ((long long)t * (2 * key_heads + heads) + key_head) * width;
        const float *k = q + key_heads * width, *v = q + (2 * key_heads + head - key_head) * width;
        const long long gate = (long long)t * heads + head;
        float key_squares = 0.f, query_squares = 0.f, answer = 0.f, result = 0.f;
        __syncthreads();
        for (int i = threadIdx.x; i < width; i += blockDim.x) {
            key[i] = k[i], query[i] = q[i];
            key_squares += k[i] * k[i], query_squares += q[i] * q[i];
        }
        const float to_key = 1.f / sqrtf(nan_unless_finite(block_sum(key_squares, parts)) + epsilon);
        const float to_query = 1.f / sqrtf(nan_unless_finite(block_sum(query_squares, parts)) + epsilon);
        for (int i = warp; i < width; i += warps) answer += key[i] * (state[32 * i + lane] *= fade[gate]);
        parts[32 * warp + lane] = answer;
        __syncthreads();
        answer = 0.f;
        for (int w = 0; w < warps; w++) answer += parts[32 * w + lane];
        const float change = ((inside ? v[feature] : 0.f) - to_key * answer) * beta[gate] * to_key;
        for (int i = warp; i < width; i += warps) result += query[i] * (state[32 * i + lane] += key[i] * change);
        __syncthreads();
        parts[32 * warp + lane] = result;
        __syncthreads();
        if (warp == 0 && inside) {
            result = 0.f;
            for (int w = 0; w < warps; w++) result += parts[32 * w + lane];
            out[gate * width + feature] = result * to_query / sqrtf((float)width);
        }
    }
    for (int i = warp; i < width; i += warps)
        if (inside) after[column + (long long)i * width] = state[32 * i + lane];
}

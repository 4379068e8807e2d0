// The k largest of each of `splits` parts of logits[t, :], best first, ties to the lower id; launched again on what
// came out (with x_ids) it gives the k largest of all. What is not finite counts as infinity, as in argmax.
// values f32 and ids int32 [T, splits, k]; x f32 [T, n]; x_ids int32 [T, n] or null: the ids are the indices. A part
// is ceil(n / splits) numbers; where a part has fewer than k, the rest are minus infinity with id -1.
// grid (splits, T); shared: the part in floats, a Best for each warp. Bytes: 4 n; latency-bound: k rounds over shared
// memory, about 1 us each for parts of 8192, so 0.1 ms for k = 40. Called once a token by sampling.
KERNEL(top_k)(float* values, int* ids, const float* x, const int* x_ids, int n, int k) {
    SHARED(float, left);  // NaN: taken
    const int span = (n + gridDim.x - 1) / gridDim.x, from = blockIdx.x * span, count = max(0, min(span, n - from));
    Best* scratch = (Best*)(left + (span + 1) / 2 * 2);
    x += (long long)blockIdx.y * n + from;
    const long long at = ((long long)blockIdx.y * gridDim.x + blockIdx.x) * k;
    for (int i = threadIdx.x; i < count; i += blockDim.x) left[i] = x_ids || fabsf(x[i]) < INFINITE ? x[i] : INFINITE;
    __syncthreads();
    for (int r = 0; r < k; r++) {
        Best best = {-INFINITE, 0x7fffffff};
        for (int i = threadIdx.x; i < count; i += blockDim.x) best = better(best, Best{left[i], i});
        best = warp_best(best);
        if (lane_id() == 0) scratch[warp_id()] = best;
        __syncthreads();
        for (int w = 0; w < warp_count(); w++) best = better(best, scratch[w]);
        if (threadIdx.x == 0) {
            const bool found = best.index < count;
            values[at + r] = best.value;
            ids[at + r] = !found ? -1 : x_ids ? x_ids[(long long)blockIdx.y * n + from + best.index] : from + best.index;
            if (found) left[best.index] = __int_as_float(0x7fc00000);
        }
        __syncthreads();
    }
}

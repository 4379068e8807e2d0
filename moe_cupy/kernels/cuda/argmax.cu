// values[t], ids[t] = the largest of logits[t, :] and its index, ties to the lower. What is not finite counts as
// infinity, so that whoever looks at the value sees that something is wrong. values f32 and ids int32 [T], logits f32
// [T, n]. grid T: a block for each row; shared: a Best for each warp. Bytes: 4 n: one block reads at a few percent of
// the bandwidth, about 10 us for n = 150000. Called once a token by greedy sampling.
KERNEL(argmax)(float* values, int* ids, const float* logits, int n) {
    SHARED(Best, scratch);
    logits += (long long)blockIdx.x * n;
    Best best = {-INFINITE, 0x7fffffff};
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        best = better(best, Best{fabsf(logits[i]) < INFINITE ? logits[i] : INFINITE, i});
    best = warp_best(best);
    if (lane_id() == 0) scratch[warp_id()] = best;
    __syncthreads();
    for (int w = 0; w < warp_count(); w++) best = better(best, scratch[w]);
    if (threadIdx.x == 0) values[blockIdx.x] = best.value, ids[blockIdx.x] = best.index;
}

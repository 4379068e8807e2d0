// The router of one MoE layer: scores, bias for the selection alone, groups, top-k, weights, in one launch.
// ids int32 [T, used], best first, ties to the lower id; weights f32 [T, used]; logits f32 [T, E]; bias f32 [E] or
// null. gating 0: softmax, 1: sigmoid, 2: softmax over the selected logits. select_logits: choose by logits, not scores.
// groups > 1: only the groups_used groups with the largest sum of their two best take part. renormalise: weights are
// divided by max(their sum, 2^-14). They are NaN where a logit or the bias is not finite, of which the choice may show
// nothing. grid T: a block for each token; shared: 2 E + groups floats, a Best for each warp.
// Bytes: 4 E; latency-bound (used rounds of two barriers: 32 threads for E <= 128). Called once a MoE layer.
KERNEL(router)(int* ids, float* weights, const float* logits, const float* bias, int experts, int used, int groups,
               int groups_used, int gating, int select_logits, int renormalise, float scale) {
    SHARED(float, score);
    float* choice = score + experts;  // NaN: taken
    float* of_group = choice + experts;
    Best* scratch = (Best*)(of_group + groups);
    const int tid = threadIdx.x, threads = blockDim.x, size = experts / groups;
    logits += (long long)blockIdx.x * experts;

    Best top = {-INFINITE, 0x7fffffff};
    float total = 0.f, zero = 0.f;  // zero: NaN if a logit or the bias is not finite
    for (int e = tid; e < experts; e += threads) {
        top = better(top, Best{logits[e], e});
        zero += logits[e] - logits[e] + (bias ? bias[e] - bias[e] : 0.f);
    }
    zero = block_sum(zero, (float*)scratch);
    top = warp_best(top);
    if (lane_id() == 0) scratch[warp_id()] = top;
    __syncthreads();
    for (int w = 0; w < warp_count(); w++) top = better(top, scratch[w]);
    __syncthreads();
    if (gating == 0) {
        for (int e = tid; e < experts; e += threads) total += expf(logits[e] - top.value);
        total = block_sum(total, (float*)scratch);
    }
    for (int e = tid; e < experts; e += threads) {
        const float x = logits[e];
        score[e] = gating == 0 ? expf(x - top.value) / total : gating == 1 ? sigmoid(x) : x;
        const float wanted = (select_logits ? x : score[e]) + (bias ? bias[e] : 0.f);
        choice[e] = wanted == wanted ? wanted : -INFINITE;
    }
    __syncthreads();

    if (groups > 1) {
        for (int g = tid; g < groups; g += threads) {
            float best = -INFINITE, second = -INFINITE;
            for (int e = g * size; e < (g + 1) * size; e++) {
                second = fmaxf(second, fminf(best, choice[e]));
                best = fmaxf(best, choice[e]);
            }
            of_group[g] = size > 1 ? best + second : best;
        }
        __syncthreads();
        for (int e = tid; e < experts; e += threads) {
            int before = 0;  // groups that are better than this expert's
            const int g = e / size;
            for (int other = 0; other < groups; other++)
                before += of_group[other] > of_group[g] || (of_group[other] == of_group[g] && other < g);
            if (before >= groups_used) choice[e] = -INFINITE;
        }
        __syncthreads();
    }

    ids += (long long)blockIdx.x * used, weights += (long long)blockIdx.x * used;
    for (int r = 0; r < used; r++) {
        Best best = {-INFINITE, 0x7fffffff};
        for (int e = tid; e < experts; e += threads) best = better(best, Best{choice[e], e});
        best = warp_best(best);
        if (lane_id() == 0) scratch[warp_id()] = best;
        __syncthreads();
        for (int w = 0; w < warp_count(); w++) best = better(best, scratch[w]);
        if (tid == 0) {
            ids[r] = best.index, weights[r] = score[best.index];
            choice[best.index] = __int_as_float(0x7fc00000);
        }
        __syncthreads();
    }
    if (tid != 0) return;
    if (gating == 2) {  // weights are logits, the largest first unless a bias chose
        float largest = weights[0];
        total = 0.f;
        for (int r = 1; r < used; r++) largest = fmaxf(largest, weights[r]);
        for (int r = 0; r < used; r++) total += weights[r] = expf(weights[r] - largest);
        for (int r = 0; r < used; r++) weights[r] /= total;
    }
    total = 0.f;
    for (int r = 0; r < used; r++) total += weights[r];
    const float divisor = renormalise ? fmaxf(total, 6.103515625e-5f) : 1.f;
    for (int r = 0; r < used; r++) weights[r] = weights[r] / divisor * scale + zero;
}

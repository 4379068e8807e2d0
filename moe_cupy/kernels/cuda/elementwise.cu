// Small ops on f32 arrays of n numbers, one thread a number, grid ceil(n / block), no shared memory. Memory-bound in a
// prompt, launch-bound for a token: those that a layer needs for every token are fused into their neighbours where
// it was easy (residual into rms_norm, activation into expert_gate_up, weighted sum into expert_down).
#define INDEX                                             \
    const int i = blockIdx.x * blockDim.x + threadIdx.x; \
    if (i >= n) return

// out += scale * x.
KERNEL(add_scaled)(float* out, const float* x, float scale, int n) {
    INDEX;
    out[i] += scale * x[i];
}
// x *= factor[i / span] or, if is_gate, x *= sigmoid(factor[i / span]); x *= scale.
KERNEL(multiply)(float* x, const float* factor, int span, int is_gate, float scale, int n) {
    INDEX;
    const float by = factor ? factor[i / span] : 1.f;
    x[i] *= (is_gate ? sigmoid(nan_unless_finite(by)) : by) * scale;
}
// out = act(gate, up).
KERNEL(activate)(float* out, const float* gate, const float* up, int activation, int n) {
    INDEX;
    out[i] = gated(activation, gate[i], up[i]);
}
// x = limit * tanh(x / limit), NaN where it is not finite.
KERNEL(softcap)(float* x, float limit, int n) {
    INDEX;
    x[i] = limit * tanhf(nan_unless_finite(x[i]) / limit);
}
// x within -limit..limit, NaN where it is not finite.
KERNEL(clamp)(float* x, float limit, int n) {
    INDEX;
    x[i] = fabsf(x[i]) < INFINITE ? fminf(fmaxf(x[i], -limit), limit) : NOT_A_NUMBER;
}
// out[t, d] (+)= sum over r of weights[t, r] * parts[t, r, d], in rank order; n = T * width.
KERNEL(combine)(float* out, const float* parts, const float* weights, int used, int width, int add, int n) {
    INDEX;
    const int t = i / width, d = i % width;
    float total = 0.f;
    for (int r = 0; r < used; r++) total += weights[t * used + r] * parts[((long long)t * used + r) * width + d];
    out[i] = add ? out[i] + total : total;
}

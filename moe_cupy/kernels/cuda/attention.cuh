// Attention's running softmax: a warp mixes value rows by 32 scores at a time and never holds them all.
// A lane keeps output features lane, lane + 32, ..., so V <= 512.
#define MIX_WIDTH 16
struct Mixed {
    float top, total;  // largest score so far; this lane's share of the sum of exp(score - top)
    float o[MIX_WIDTH];
};
__device__ __forceinline__ void begin(Mixed& mixed) {
    mixed.top = -INFINITE, mixed.total = 0.f;
#pragma unroll
    for (int i = 0; i < MIX_WIDTH; i++) mixed.o[i] = 0.f;
}
// Takes a score of each lane (minus infinity: none) and returns its weight exp(score - top) under the new top. A score
// of NaN counts as infinity, which makes all weights NaN.
__device__ __forceinline__ float weigh(Mixed& mixed, float score) {
    score = score == score ? score : INFINITE;
    const float top = fmaxf(mixed.top, warp_max(score));
    if (top == -INFINITE) return 0.f;
    const float fade = expf(mixed.top - top), p = expf(score - top);
    mixed.top = top, mixed.total = mixed.total * fade + p;
#pragma unroll
    for (int i = 0; i < MIX_WIDTH; i++) mixed.o[i] *= fade;
    return p;
}
__device__ __forceinline__ float capped(float score, float cap) { return cap > 0.f ? cap * tanhf(score / cap) : score; }
// The first position that a query sees; a window counts from the query back, chunks are aligned.
__device__ __forceinline__ int first_seen(int position, int window, int chunk) {
    if (chunk > 0) return position / chunk * chunk;
    return window > 0 ? max(0, position - window + 1) : 0;
}

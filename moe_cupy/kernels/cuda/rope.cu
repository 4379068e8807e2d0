// Turns pairs (a, b) of a head by its position's angle: a, b <- a cos - b sin, a sin + b cos, in place.
// x f32 [T, heads, width]; pairs lie in features offset.. of a head: neighbours ("norm") or half apart ("neox");
// cos and sin f32 [*, half], row positions[t] (null: row t). One thread a pair, grid ceil(T * heads * half / block);
// no shared memory. Bytes: 16 a pair + tables; launch-bound. Called for q and k; tables hold YaRN and the like.
KERNEL(rope)(float* x, const float* cosine, const float* sine, const int* positions, int n_tokens, int heads,
             int width, int offset, int half, int neox) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= n_tokens * heads * half) return;
    const int pair = index % half, head = index / half, t = head / heads;
    const long long at = (long long)(positions ? positions[t] : t) * half + pair;
    float* a = x + (long long)head * width + offset + (neox ? pair : 2 * pair);
    float* b = a + (neox ? half : 1);
    const float c = cosine[at], s = sine[at], old_a = *a, old_b = *b;
    *a = old_a * c - old_b * s;
    *b = old_a * s + old_b * c;
}

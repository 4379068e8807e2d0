// Each run of `count` neighbours of x times the orthonormal Walsh-Hadamard matrix, in place: spreads an outlier over its
// run before keys and values are rounded to few bits, and takes that back (the matrix is its own inverse).
// x f32 [runs, count], count a power of two; scale count^-1/2. grid runs: a block for each run; shared: count floats.
// Sums and differences of neighbours, then of pairs, ...: count log2(count) additions. Bytes: 8 a number; launch-bound.
// Called up to four times a layer, on queries, keys, values and what attention mixed, where the cache is quantized.
KERNEL(hadamard)(float* x, int count, float scale) {
    SHARED(float, run);
    x += (long long)blockIdx.x * count;
    for (int i = threadIdx.x; i < count; i += blockDim.x) run[i] = x[i] * scale;
    for (int length = 1; length < count; length *= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < count / 2; i += blockDim.x) {
            const int at = i / length * 2 * length + i % length;
            const float a = run[at], b = run[at + length];
            run[at] = a + b, run[at + length] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) x[i] = run[i];
}

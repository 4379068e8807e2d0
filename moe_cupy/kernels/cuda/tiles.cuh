// What the matrix products of a prompt share: a block of 128 threads makes a tile of 64 rows x 32 pairs, each thread
// 4 x 4 sums. A pair is a token and one of its experts. Weights of one slot, and which pairs use it:
enum { TILE_ROWS = 64, TILE_PAIRS = 32 };
// Quants of a word lie so far apart in shared memory: 8 more than there are, so that the lanes of an mma, 8 neighbours
// of 4 words, meet 32 banks.
enum { ROW_STEP = TILE_ROWS + 8, PAIR_STEP = TILE_PAIRS + 8 };
enum { TILE_WORDS = 8 * ROW_STEP + 4 * TILE_ROWS + 8 * PAIR_STEP + 2 * TILE_PAIRS };
struct Work {
    const uint8_t* weights;
    const int* order;  // null: pairs as they come
    int row0, rows, pair0, ends, per_row, cols;

    __device__ __forceinline__ bool is_row(int r) const { return row0 + r < rows; }
    __device__ __forceinline__ bool is_pair(int p) const { return pair0 + p < ends; }
    __device__ __forceinline__ long long pair(int p) const { return order ? order[pair0 + p] : pair0 + p; }
    __device__ __forceinline__ long long vector(int p) const { return pair(p) / per_row; }
};
__device__ __forceinline__ Work work_of(const uint8_t* const* weight_of, const int* order, const int* first, int pairs,
                                        int rows, int cols, int per_row) {
    const int slot = blockIdx.z, begins = first ? first[slot] : 0;
    return {weight_of[slot], order, (int)blockIdx.x * TILE_ROWS, rows, begins + (int)blockIdx.y * TILE_PAIRS,
            first ? first[slot + 1] : pairs, per_row, cols};
}
__device__ __forceinline__ int my_row() { return threadIdx.x % 16 * 4; }
__device__ __forceinline__ int my_pair() { return threadIdx.x / 16 * 4; }

// The 32 columns that a thread brings: threads 0..63 decode a row's, 64..95 have a pair's.
struct Brought {
    Group w;
    Q8 x;
};
template <class F> __device__ __forceinline__ Brought bring(const Work& work, const Q8* x, int g) {
    Brought out = {};
    const int tid = threadIdx.x, p = tid - TILE_ROWS;
    if (tid < TILE_ROWS) {
        if (work.is_row(tid)) out.w = F::load(work.weights + (work.row0 + tid) * row_bytes<F>(work.cols), g);
    } else if (p < TILE_PAIRS) {
        if (work.is_pair(p)) out.x = x[work.vector(p) * (work.cols / 32) + g];
    }
    return out;
}
// One tile of 32 columns in shared memory, TILE_WORDS words.
struct Tile {
    int* wq;    // [8][72]: word i of each row's group
    float* wf;  // [4][64]: two scales, two offsets
    int* xq;    // [8][40]
    float* xd;  // [32]
    int* xs;    // [32]: the two half sums, 16 bits each
};
__device__ __forceinline__ Tile tile_at(int* words) {
    int *wf = words + 8 * ROW_STEP, *xq = wf + 4 * TILE_ROWS, *xd = xq + 8 * PAIR_STEP;
    return {words, (float*)wf, xq, (float*)xd, xd + TILE_PAIRS};
}
__device__ __forceinline__ void put(const Tile& tile, const Brought& b) {
    const int tid = threadIdx.x, p = tid - TILE_ROWS;
    if (tid < TILE_ROWS) {
#pragma unroll
        for (int i = 0; i < 8; i++) tile.wq[i * ROW_STEP + tid] = b.w.q[i];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tile.wf[i * TILE_ROWS + tid] = b.w.scale[i];
            tile.wf[(2 + i) * TILE_ROWS + tid] = b.w.offset[i];
        }
    } else if (p < TILE_PAIRS) {
#pragma unroll
        for (int i = 0; i < 8; i++) tile.xq[i * PAIR_STEP + p] = b.x.q[i];
        tile.xd[p] = b.x.d, tile.xs[p] = (b.x.sum[0] & 0xffff) | (int)b.x.sum[1] << 16;
    }
}
template <class F> __device__ __forceinline__ void multiply_tile(float (&sum)[4][4], const Tile& tile) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int dot[4][4] = {};
#pragma unroll
        for (int i = 4 * half; i < 4 * half + 4; i++) {
            const int4 a = *(const int4*)(tile.wq + i * ROW_STEP + my_row());
            const int4 b = *(const int4*)(tile.xq + i * PAIR_STEP + my_pair());
            const int w4[4] = {a.x, a.y, a.z, a.w}, x4[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int p = 0; p < 4; p++)
#pragma unroll
                for (int r = 0; r < 4; r++) dot[p][r] = __dp4a(w4[r], x4[p], dot[p][r]);
        }
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const float d = tile.xd[my_pair() + p], q_sum = (float)(int16_t)(tile.xs[my_pair() + p] >> 16 * half);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float part = tile.wf[half * TILE_ROWS + my_row() + r] * (float)dot[p][r];
                if (F::OFFSET) part += tile.wf[(2 + half) * TILE_ROWS + my_row() + r] * q_sum;
                sum[p][r] += d * part;
            }
        }
    }
}
// What becomes of a product y of pair p: out (+)= weight[p] scale[e] y + bias[e], e the pair's expert, or 0.
struct Finish {
    const int* ids;      // [pairs], or null
    const float *weight, *scale, *bias;  // [pairs], [E], [E, rows]; each may be null
    int add;
};
__device__ __forceinline__ void store(float* out, float y, const Work& work, int p, int r, const Finish& finish) {
    if (!work.is_pair(p) || !work.is_row(r)) return;
    const long long pair = work.pair(p), e = finish.ids ? finish.ids[pair] : 0;
    if (finish.weight) y *= finish.weight[pair];
    if (finish.scale) y *= finish.scale[e];
    if (finish.bias) y += finish.bias[e * work.rows + work.row0 + r];
    float* where = out + pair * work.rows + work.row0 + r;
    *where = finish.add ? *where + y : y;
}
__device__ __forceinline__ void store_tile(float* out, const float (&sum)[4][4], const Work& work,
                                           const Finish& finish) {
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
        for (int r = 0; r < 4; r++) store(out, sum[p][r], work, my_pair() + p, my_row() + r, finish);
}

// out[p, r] (+)= w_s[r] . x[p / per_row] + bias: many vectors times one matrix, or those of each slot times its own.
// out f32 [pairs, rows]; weight_of: addresses of [rows, cols] matrices by slot; x Q8 [pairs / per_row, cols / 32];
// order int32 [pairs] and first int32 [slots + 1] of group_by_expert, or null: all pairs use slot 0. per_row: pairs
// that share a vector (`used` for gate and up, 1 for down and dense). bias f32 [rows] or null.
// A block of 128 threads makes a tile of 64 rows x 32 pairs, each thread 4 x 4: grid (ceil(rows / 64),
// ceil(max pairs of a slot / 32), slots); shared: (8 + 4) 64 + (8 + 2) 32 words = 4352 bytes.
// Bytes: each tile reads its rows once for 32 pairs; integer FLOPs 2 pairs rows cols. Compute-bound from about 32
// pairs a slot on; dp4a without double buffering: expected at a third of the dp4a peak. A prompt's matrices.
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128
enum { TILE_ROWS = 64, TILE_PAIRS = 32, GEMM_THREADS = 128 };

FORMAT_KERNEL(gemm)(float* out, const uint8_t* const* weight_of, const Q8* x, const int* order, const int* first,
                    const float* bias, int pairs, int rows, int cols, int per_row, int add) {
    SHARED(int, wq);                              // [8][64]: word i of each row's group
    float* wf = (float*)(wq + 8 * TILE_ROWS);     // [4][64]: two scales, two offsets
    int* xq = (int*)(wf + 4 * TILE_ROWS);         // [8][32]
    float* xd = (float*)(xq + 8 * TILE_PAIRS);    // [32]
    int* xs = (int*)(xd + TILE_PAIRS);            // [32]: the two half sums, 16 bits each
    const int slot = blockIdx.z, tid = threadIdx.x, row0 = blockIdx.x * TILE_ROWS;
    const int begins = first ? first[slot] : 0, ends = first ? first[slot + 1] : pairs;
    const int pair0 = begins + blockIdx.y * TILE_PAIRS;
    if (pair0 >= ends) return;  // the whole block
    const uint8_t* weights = weight_of[slot];
    const int my_row = tid % 16 * 4, my_pair = tid / 16 * 4;
    float sum[4][4] = {};

    for (int g = 0; g < cols / 32; g++) {
        __syncthreads();
        if (tid < TILE_ROWS) {
            Group w = {};
            if (row0 + tid < rows) w = FORMAT::load(weights + (row0 + tid) * row_bytes<FORMAT>(cols), g);
#pragma unroll
            for (int i = 0; i < 8; i++) wq[i * TILE_ROWS + tid] = w.q[i];
            wf[tid] = w.scale[0], wf[TILE_ROWS + tid] = w.scale[1];
            wf[2 * TILE_ROWS + tid] = w.offset[0], wf[3 * TILE_ROWS + tid] = w.offset[1];
        } else if (tid < TILE_ROWS + TILE_PAIRS) {
            const int p = tid - TILE_ROWS;
            Q8 a = {};
            if (pair0 + p < ends) a = x[(long long)((order ? order[pair0 + p] : pair0 + p) / per_row) * (cols / 32) + g];
#pragma unroll
            for (int i = 0; i < 8; i++) xq[i * TILE_PAIRS + p] = a.q[i];
            xd[p] = a.d, xs[p] = (a.sum[0] & 0xffff) | (int)a.sum[1] << 16;
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int dot[4][4] = {};
#pragma unroll
            for (int i = 4 * half; i < 4 * half + 4; i++) {
                const int4 a = *(const int4*)(wq + i * TILE_ROWS + my_row), b = *(const int4*)(xq + i * TILE_PAIRS + my_pair);
                const int w4[4] = {a.x, a.y, a.z, a.w}, x4[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int p = 0; p < 4; p++)
#pragma unroll
                    for (int r = 0; r < 4; r++) dot[p][r] = __dp4a(w4[r], x4[p], dot[p][r]);
            }
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const float d = xd[my_pair + p], q_sum = (float)(int16_t)(xs[my_pair + p] >> 16 * half);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    float part = wf[half * TILE_ROWS + my_row + r] * (float)dot[p][r];
                    if (FORMAT::OFFSET) part += wf[(2 + half) * TILE_ROWS + my_row + r] * q_sum;
                    sum[p][r] += d * part;
                }
            }
        }
    }
#pragma unroll
    for (int p = 0; p < 4; p++) {
        if (pair0 + my_pair + p >= ends) continue;
        const long long pair = order ? order[pair0 + my_pair + p] : pair0 + my_pair + p;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = row0 + my_row + r;
            if (row >= rows) continue;
            const float y = bias ? sum[p][r] + bias[row] : sum[p][r];
            out[pair * rows + row] = add ? out[pair * rows + row] + y : y;
        }
    }
}

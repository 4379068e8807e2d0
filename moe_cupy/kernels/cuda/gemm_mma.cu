// gemm on tensor cores. Parameters, tile, grid and shared bytes are gemm's. A warp makes 16 rows x 32 pairs, in four
// products of 16 x 8 that take 16 columns at a time: as many as share a scale in every format, so that scales come in
// after each. FLOPs 2 pairs rows cols. Expected at a quarter of the tensor cores' peak for bytes: two floating-point
// operations for 16 products, and all wait while some load. A prompt's matrices, from 16 vectors on (choice.py).
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128

// sum[n][2 m + i]: rows 16 warp + 8 m + lane / 4, pairs 8 n + 2 (lane % 4) + i.
template <class F> __device__ __forceinline__ void multiply_by_mma(float (&sum)[4][4], const Tile& tile) {
    const int r = lane_id() / 4, t = lane_id() % 4, row = 16 * warp_id() + r;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int* w = tile.wq + (4 * half + t) * ROW_STEP + row;
        const int a[2] = {w[0], w[8]};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int pair = 8 * n + 2 * t;
            int c[4] = {};
            mma_16x8x16(c, a, tile.xq[(4 * half + t) * PAIR_STEP + 8 * n + r]);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = row + j / 2 * 8, p = pair + j % 2;
                float part = tile.wf[half * TILE_ROWS + at] * (float)c[j];
                if (F::OFFSET)
                    part += tile.wf[(2 + half) * TILE_ROWS + at] * (float)(int16_t)(tile.xs[p] >> 16 * half);
                sum[n][j] += tile.xd[p] * part;
            }
        }
    }
}

FORMAT_KERNEL(gemm_mma)(float* out, const uint8_t* const* weight_of, const Q8* x, const int* order, const int* first,
                        const int* ids, const float* weight, const float* scale, const float* bias, int pairs, int rows,
                        int cols, int per_row, int add) {
    SHARED(int, words);
    const Work work = work_of(weight_of, order, first, pairs, rows, cols, per_row);
    if (!work.is_pair(0)) return;  // the whole block
    const Tile tile = tile_at(words);
    float sum[4][4] = {};
    for (int g = 0; g < cols / 32; g++) {
        __syncthreads();
        put(tile, bring<FORMAT>(work, x, g));
        __syncthreads();
        multiply_by_mma<FORMAT>(sum, tile);
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = 16 * warp_id() + lane_id() / 4 + j / 2 * 8, p = 8 * n + 2 * (lane_id() % 4) + j % 2;
            store(out, sum[n][j], work, p, row, {ids, weight, scale, bias, add});
        }
}

// gemm on tensor cores. Parameters, tile, grid and shared bytes are gemm's. A warp makes 16 rows x 32 pairs, in 2 x 4
// products of 8 x 8 that take 16 columns at a time: as many as share a scale in every format, so that scales come in
// after each. m8n8k16 is what all architectures from 7.5 on have; larger shapes would load less often.
// FLOPs 2 pairs rows cols. Expected at a quarter of the tensor cores' peak for bytes: two floating-point operations
// for 16 products, and all wait while some load. Called by tests and gpu-check, to measure gemm against.
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128

template <class F> __device__ __forceinline__ void multiply_by_mma(float (&sum)[2][4][2], const Tile& tile) {
    const int r = lane_id() / 4, t = lane_id() % 4, first_row = 16 * warp_id() + r;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int b = tile.xq[(4 * half + t) * PAIR_STEP + 8 * n + r], pair = 8 * n + 2 * t;
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const int row = first_row + 8 * m;
                int c[2] = {};
                mma_8x8x16(c, tile.wq[(4 * half + t) * ROW_STEP + row], b);
                const float scale = tile.wf[half * TILE_ROWS + row], offset = tile.wf[(2 + half) * TILE_ROWS + row];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float part = scale * (float)c[i];
                    if (F::OFFSET) part += offset * (float)(int16_t)(tile.xs[pair + i] >> 16 * half);
                    sum[m][n][i] += tile.xd[pair + i] * part;
                }
            }
        }
}

FORMAT_KERNEL(gemm_mma)(float* out, const uint8_t* const* weight_of, const Q8* x, const int* order, const int* first,
                        const float* bias, int pairs, int rows, int cols, int per_row, int add) {
    SHARED(int, words);
    const Work work = work_of(weight_of, order, first, pairs, rows, cols, per_row);
    if (!work.is_pair(0)) return;  // the whole block
    const Tile tile = tile_at(words);
    float sum[2][4][2] = {};  // rows 16 warp + 8 m + lane / 4, pairs 8 n + 2 (lane % 4) + i
    for (int g = 0; g < cols / 32; g++) {
        __syncthreads();
        put(tile, bring<FORMAT>(work, x, g));
        __syncthreads();
        multiply_by_mma<FORMAT>(sum, tile);
    }
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int m = j / 8, n = j / 2 % 4, row = 16 * warp_id() + 8 * m + lane_id() / 4;
        const int p = 8 * n + 2 * (lane_id() % 4) + j % 2;
        if (!work.is_row(row) || !work.is_pair(p)) continue;
        float* where = out + work.pair(p) * rows + work.row0 + row;
        const float y = bias ? sum[m][n][j % 2] + bias[work.row0 + row] : sum[m][n][j % 2];
        *where = add ? *where + y : y;
    }
}

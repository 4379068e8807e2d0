// out[p, r] (+)= weight[p] scale[e] w_s[r] . x[p / per_row] + bias[e, r]: many vectors times one matrix, or those of
// each slot times its own; e is the pair's expert, ids[p].
// out f32 [pairs, rows]; weight_of: addresses of [rows, cols] matrices by slot; x Q8 [pairs / per_row, cols / 32];
// order int32 [pairs] and first int32 [slots + 1] of group_by_expert, or null: all pairs use slot 0. per_row: pairs
// that share a vector (`used` for gate and up, 1 for down and dense). ids int32 [pairs] or null: all are expert 0;
// weight f32 [pairs], scale f32 [E], bias f32 [E, rows]; each may be null.
// A block of 128 threads makes a tile of 64 rows x 32 pairs, each thread 4 x 4: grid (ceil(rows / 64),
// ceil(max pairs of a slot / 32), slots); shared: 8 (72 + 40) + 4 64 + 2 32 words = 4864 bytes.
// Bytes: each tile reads its rows once for 32 pairs; integer FLOPs 2 pairs rows cols. Compute-bound from about 32
// pairs a slot on; all wait while some load (gemm_pipelined does not): expected at a third of the dp4a peak. A
// prompt's matrices, where tensor cores do not pay (choice.py).
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128

FORMAT_KERNEL(gemm)(float* out, const uint8_t* const* weight_of, const Q8* x, const int* order, const int* first,
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
        multiply_tile<FORMAT>(sum, tile);
    }
    store_tile(out, sum, work, {ids, weight, scale, bias, add});
}

// gemm with two tiles in shared memory: while all multiply one, the loads of the next are under way and land in the
// other. Parameters, grid and FLOPs are gemm's; shared: 2 x 4864 bytes. One barrier for 32 columns instead of two, and
// the latency of global memory is hidden behind 128 dp4a: expected at half of the dp4a peak against gemm's third, for
// 10 to 20 registers more. Teaches what gemm leaves undone; gpu-check measures it, the engine never launches it.
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128

FORMAT_KERNEL(gemm_pipelined)(float* out, const uint8_t* const* weight_of, const Q8* x, const int* order,
                              const int* first, const int* ids, const float* weight, const float* scale,
                              const float* bias, int pairs, int rows, int cols, int per_row, int add) {
    SHARED(int, words);
    const Work work = work_of(weight_of, order, first, pairs, rows, cols, per_row);
    if (!work.is_pair(0)) return;  // the whole block
    const int steps = cols / 32;
    float sum[4][4] = {};
    put(tile_at(words), bring<FORMAT>(work, x, 0));
    __syncthreads();
    for (int g = 0; g < steps; g++) {
        Brought next = {};
        if (g + 1 < steps) next = bring<FORMAT>(work, x, g + 1);  // used only after the products
        multiply_tile<FORMAT>(sum, tile_at(words + g % 2 * TILE_WORDS));
        if (g + 1 < steps) put(tile_at(words + (g + 1) % 2 * TILE_WORDS), next);
        __syncthreads();
    }
    store_tile(out, sum, work, {ids, weight, scale, bias, add});
}

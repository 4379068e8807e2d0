// out[p, r] (+)= w_s[r] . x[p / per_row] + bias, activations as they are: gemm for plain numbers, and for quantized
// weights where activations must not be rounded. Parameters and grid are gemm's; x f32 [pairs / per_row, cols].
// 32 columns at a time are decoded to shared memory, row r of a tile by thread r: 32 (64 + 32) floats = 12288 bytes.
// Bytes: each tile reads its rows once for 32 pairs; FLOPs 2 pairs rows cols. Compute-bound from about 8 pairs a slot
// on: 16 FMAs for two 16-byte loads of shared memory, expected at a third of the FP32 peak. A prompt's matrices.
#undef REGISTERS_PER_THREAD
#define REGISTERS_PER_THREAD 128

FORMAT_KERNEL(gemm_float)(float* out, const uint8_t* const* weight_of, const float* x, const int* order,
                          const int* first, const int* ids, const float* weight, const float* scale, const float* bias,
                          int pairs, int rows, int cols, int per_row, int add) {
    SHARED(float, ws);                       // [32][64]: column, row
    float* xs = ws + 32 * TILE_ROWS;         // [32][32]: column, pair
    const Work work = work_of(weight_of, order, first, pairs, rows, cols, per_row);
    if (!work.is_pair(0)) return;  // the whole block
    const int tid = threadIdx.x, p = tid % TILE_PAIRS, from = tid / TILE_PAIRS % 2 * 16;
    float sum[4][4] = {};

    for (int g = 0; g < (cols + 31) / 32; g++) {
        const int here = min(32, cols - 32 * g);
        __syncthreads();
        if (tid < TILE_ROWS) {
            const uint8_t* row = work.weights + (work.row0 + tid) * row_bytes<FORMAT>(cols);
            if (work.is_row(tid)) Rows<FORMAT>::decode(row, g, cols, ws + tid, TILE_ROWS);
            for (int i = work.is_row(tid) ? here : 0; i < 32; i++) ws[i * TILE_ROWS + tid] = 0.f;
        } else {  // two threads a pair, 16 columns each
            const bool is_pair = work.is_pair(p);
            const float* mine = x + 32 * g + (is_pair ? work.vector(p) * cols : 0);
            for (int i = from; i < from + 16; i++) xs[i * TILE_PAIRS + p] = is_pair && i < here ? mine[i] : 0.f;
        }
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < 32; i++) {
            const float4 a = *(const float4*)(ws + i * TILE_ROWS + my_row());
            const float4 b = *(const float4*)(xs + i * TILE_PAIRS + my_pair());
            const float w4[4] = {a.x, a.y, a.z, a.w}, x4[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int r = 0; r < 4; r++) sum[j][r] += w4[r] * x4[j];
        }
    }
    store_tile(out, sum, work, {ids, weight, scale, bias, add});
}

// out[t, :] = scale * table[ids[t], :], decoded: token embeddings; without ids (null), all rows in order: dequantize.
// out f32 [T, cols], table [*, cols] in a GGUF format, ids int32 [T]. A thread for 32 elements, grid
// (T, ceil(cols / 32 / block)); no shared memory. Bytes: T (row_bytes(cols) + 4 cols); writes are not coalesced (a
// thread writes 128 bytes in a row), so expected at a quarter of the bandwidth: it is once a token.
FORMAT_KERNEL(embed)(float* out, const uint8_t* table, const int* ids, int cols, float scale) {
    const int g = blockIdx.y * blockDim.x + threadIdx.x;
    if (g >= (cols + 31) / 32) return;
    const long long row = ids ? ids[blockIdx.x] : blockIdx.x;
    out += (long long)blockIdx.x * cols;
    Rows<FORMAT>::decode(table + row * row_bytes<FORMAT>(cols), g, cols, out + 32 * g, 1);
    for (int i = 32 * g; i < min(32 * g + 32, cols); i++) out[i] *= scale;
}

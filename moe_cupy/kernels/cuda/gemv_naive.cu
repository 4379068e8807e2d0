// out[t, r] = w[r, :] . x[t, :] with a thread for each row: the obvious way, kept to measure gemv against.
// out f32 [T, rows], w [rows, cols] in a GGUF format, x f32 [T, cols]. grid (ceil(rows / block), T); no shared memory.
// Bytes and FLOPs as gemv. The threads of a warp read 32 rows at once, so each load touches 32 lines and uses a few
// bytes of each: expected at a tenth of gemv's speed or less. Called by nothing but tests and a notebook.
FORMAT_KERNEL(gemv_naive)(float* out, const uint8_t* w, const float* x, int rows, int cols) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const uint8_t* mine = w + row * row_bytes<FORMAT>(cols);
    float sum = 0.f;
    for (int g = 0; g < (cols + 31) / 32; g++) sum += Rows<FORMAT>::dot(mine, g, cols, x + (long long)blockIdx.y * cols);
    out[(long long)blockIdx.y * rows + row] = sum;
}

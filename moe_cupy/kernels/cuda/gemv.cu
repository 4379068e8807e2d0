// out[t, h, r] (+)= scale * scales[h] * (w[h, r, :] . x[t, h, :]) + bias[h, r]: a matrix times one or few vectors, or
// each head's matrix times its own. out f32 [T, H] vectors out_stride apart, w [H * rows, cols] in a GGUF format, x
// [T, H] vectors x_stride numbers apart, f32 (gemv) or Q8 blocks (gemv_q8), scales f32 [H] and bias f32 [H, rows] or
// null; cols is a multiple of the format's block. grid (ceil(rows / warps), T, H), H = 1 but for MLA: a warp for each
// row; no shared memory. Bytes: H rows row_bytes(cols) + small; FLOPs: 2 T H rows cols. Memory-bound: expected at 60-80 %
// of the copy bandwidth where cols >= 2048 (lanes 2i and 2i + 1 of k-quants share their bytes through L1), less
// below, as fewer than 32 lanes have a group. Called for every projection of a decoded token and the output head.
template <class X> __device__ __forceinline__ void gemv_rows(
    float* out, const uint8_t* w, const X* x, const float* bias, const float* scales, int rows, int cols,
    int x_stride, int out_stride, float scale, int add) {
    const int row = blockIdx.x * warp_count() + warp_id(), head = blockIdx.z;
    if (row >= rows) return;  // the whole warp
    const long long vector = (long long)blockIdx.y * gridDim.z + head, matrix_row = (long long)head * rows + row;
    x += vector * (sizeof(X) == 4 ? x_stride : x_stride / 32);
    float sum = row_dot<FORMAT>(w + matrix_row * row_bytes<FORMAT>(cols), cols, x) * scale;
    if (scales) sum *= scales[head];
    if (bias) sum += bias[matrix_row];
    float* where = out + vector * out_stride + row;
    if (lane_id() == 0) *where = add ? *where + sum : sum;
}

FORMAT_KERNEL(gemv)(float* out, const uint8_t* w, const float* x, const float* bias, const float* scales, int rows,
                    int cols, int x_stride, int out_stride, float scale, int add) {
    gemv_rows(out, w, x, bias, scales, rows, cols, x_stride, out_stride, scale, add);
}
#ifdef QUANTIZED
FORMAT_KERNEL(gemv_q8)(float* out, const uint8_t* w, const Q8* x, const float* bias, const float* scales, int rows,
                       int cols, int x_stride, int out_stride, float scale, int add) {
    gemv_rows(out, w, x, bias, scales, rows, cols, x_stride, out_stride, scale, add);
}
#endif

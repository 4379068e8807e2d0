// out = x / sqrt(mean(x^2) + epsilon) * weight + bias over the last axis; x += residual first, and stays so.
// kind 0: RMS norm; 1: layer norm (x less its mean); 2: unit length (the sum instead of the mean). A row whose squares
// are not finite becomes NaN.
// out f32 rows of width, out_stride apart; x f32 rows, x_stride apart, out == x is fine; residual f32 [n, width],
// weight and bias f32 [width], each may be null. grid n: a block for each row; shared: a float for each warp.
// Bytes: 8 (to 16 with a residual) a feature; memory-bound but launch-bound at one token. Called twice a layer, and
// for the heads of q and k; a block of 256 for D >= 1024, of 32 for heads.
KERNEL(rms_norm)(float* out, float* x, const float* residual, const float* weight, const float* bias, int width,
                 int x_stride, int out_stride, float epsilon, int kind) {
    SHARED(float, scratch);
    const long long row = blockIdx.x;
    out += row * out_stride, x += row * x_stride;
    float mean = 0.f, squares = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        if (residual) x[i] += residual[row * width + i];
        if (kind == 1) mean += x[i];
    }
    if (kind == 1) mean = block_sum(mean, scratch) / (float)width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (x[i] - mean) * (x[i] - mean);
    const float total = nan_unless_finite(block_sum(squares, scratch));
    const float scale = 1.f / sqrtf((kind == 2 ? total : total / (float)width) + epsilon);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float y = (x[i] - mean) * scale;
        if (weight) y *= weight[i];
        out[i] = bias ? y + bias[i] : y;
    }
}

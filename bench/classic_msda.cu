// Multi-scale deformable attention as it is usually written in CUDA: the baseline, not an operator of ours.
// float32; a thread computes one channel of one (query, head) and reads 4 bytes at a time. Backward: a block of
// D threads per (query, head); after every sample thread 0 adds up the channels' shares, between two barriers,
// and each channel adds to its four cells by scalar atomics. Softmax and locations are computed outside.
//
//   value [B, S, A, D]   sizes [L, 2] int64 (height, width)   starts [L] int64, first cell of each level
//   locations [B, Q, A, L, P, 2] in 0..1 (x, y)   weights [B, Q, A, L, P]   out [B, Q, A, D]
//
// No includes, so that nvcc and NVRTC both take it.

struct Corners {
    long long cell[4];  // offsets into value of channel 0, or -1 outside the level
    float share[4];     // bilinear weights
    float dx[4], dy[4]; // their derivatives
};

__device__ __forceinline__ Corners corners(float x, float y, int h, int w, long long base, int row) {
    Corners c;
    const float floor_x = floorf(x), floor_y = floorf(y);
    const int x0 = (int)floor_x, y0 = (int)floor_y;
    const float fx = x - floor_x, fy = y - floor_y;
    const float wx[2] = {1.f - fx, fx}, wy[2] = {1.f - fy, fy};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int i = k >> 1, j = k & 1;
        const bool inside = y0 + i >= 0 && y0 + i < h && x0 + j >= 0 && x0 + j < w;
        c.cell[k] = inside ? base + ((long long)(y0 + i) * w + x0 + j) * row : -1;
        c.share[k] = wy[i] * wx[j];
        c.dx[k] = (j ? 1.f : -1.f) * wy[i];
        c.dy[k] = (i ? 1.f : -1.f) * wx[j];
    }
    return c;
}

extern "C" __global__ void classic_forward(
    const float* value, const long long* sizes, const long long* starts, const float* locations,
    const float* weights, float* out, int B, int S, int Q, int A, int D, int L, int P) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)B * Q * A * D) return;
    const int d = i % D;
    const long long row = i / D;  // (b, q, a)
    const int a = row % A;
    const long long b = row / ((long long)Q * A);
    const float* weight = weights + row * L * P;
    const float* location = locations + row * L * P * 2;
    float sum = 0.f;
    for (int l = 0; l < L; ++l) {
        const int h = sizes[2 * l], w = sizes[2 * l + 1];
        const long long base = ((b * S + starts[l]) * A + a) * D + d;
        for (int p = 0; p < P; ++p, ++weight, location += 2) {
            const float x = location[0] * w - 0.5f, y = location[1] * h - 0.5f;
            if (x > -1.f && y > -1.f && x < w && y < h) {
                const Corners c = corners(x, y, h, w, base, A * D);
                float sample = 0.f;
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (c.cell[k] >= 0) sample += c.share[k] * value[c.cell[k]];
                sum += *weight * sample;
            }
        }
    }
    out[i] = sum;
}

// blockDim.x == D <= 64; grad_value starts as zeros
extern "C" __global__ void classic_backward(
    const float* grad, const float* value, const long long* sizes, const long long* starts,
    const float* locations, const float* weights, float* grad_value, float* grad_locations,
    float* grad_weights, int B, int S, int Q, int A, int D, int L, int P) {
    __shared__ float share_x[64], share_y[64], share_weight[64];
    const int d = threadIdx.x;
    const long long row = blockIdx.x;  // (b, q, a)
    const int a = row % A;
    const long long b = row / ((long long)Q * A);
    const float g = grad[row * D + d];
    long long sample = row * L * P;
    for (int l = 0; l < L; ++l) {
        const int h = sizes[2 * l], w = sizes[2 * l + 1];
        const long long base = ((b * S + starts[l]) * A + a) * D + d;
        for (int p = 0; p < P; ++p, ++sample) {
            const float x = locations[2 * sample] * w - 0.5f, y = locations[2 * sample + 1] * h - 0.5f;
            const float weight = weights[sample];
            float along_x = 0.f, along_y = 0.f, along_weight = 0.f;
            if (x > -1.f && y > -1.f && x < w && y < h) {
                const Corners c = corners(x, y, h, w, base, A * D);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (c.cell[k] >= 0) {
                        const float v = value[c.cell[k]];
                        along_weight += c.share[k] * v;
                        along_x += c.dx[k] * v;
                        along_y += c.dy[k] * v;
                        atomicAdd(grad_value + c.cell[k], g * weight * c.share[k]);
                    }
            }
            share_x[d] = g * weight * along_x * w;
            share_y[d] = g * weight * along_y * h;
            share_weight[d] = g * along_weight;
            __syncthreads();
            if (d == 0) {
                float sum_x = 0.f, sum_y = 0.f, sum_weight = 0.f;
                for (int k = 0; k < D; ++k) {
                    sum_x += share_x[k];
                    sum_y += share_y[k];
                    sum_weight += share_weight[k];
                }
                grad_locations[2 * sample] = sum_x;
                grad_locations[2 * sample + 1] = sum_y;
                grad_weights[sample] = sum_weight;
            }
            __syncthreads();
        }
    }
}

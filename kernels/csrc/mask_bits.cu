// Signs of a matrix product, packed: a block multiplies 64 queries with 128 keys in float32.
//
// A warp has 8 queries and a lane every 32nd key, so that the signs of 32 neighbouring keys are one ballot.

#include "common.cuh"

namespace tarvis {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kQueries = 8, kKeys = 4;  // of a thread
constexpr int kTileQ = kWarps * kQueries, kTileN = 32 * kKeys, kTileC = 16;

// Copies [kTileC, COUNT] of a matrix with any strides to shared memory as float32, zeros outside.
template <int COUNT, int PITCH, typename T>
__device__ inline void fill(float (&tile)[kTileC][PITCH], const T* __restrict__ from, int first, int last,
                            int64_t stride, int first_c, int last_c, int64_t stride_c) {
  const bool channels_last = stride_c < stride;  // then neighbouring threads read neighbouring channels
#pragma unroll
  for (int i = threadIdx.x; i < kTileC * COUNT; i += kThreads) {
    const int c = channels_last ? i % kTileC : i / COUNT, n = channels_last ? i / kTileC : i % COUNT;
    const bool inside = first + n < last && first_c + c < last_c;
    tile[c][n] = inside ? widen(from[(first + n) * stride + (first_c + c) * stride_c]) : 0.f;
  }
}

// Grid (tiles of keys, tiles of queries, B): folding two of them into one takes registers that spill.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_bits(const T* __restrict__ query, const T* __restrict__ features, uint32_t* __restrict__ words,
              uint8_t* __restrict__ seen, int Q, int N, int C, int64_t query_b, int64_t query_q,
              int64_t query_c, int64_t features_b, int64_t features_c, int64_t features_n) {
  // padded: the rows of one stay aligned for reads of four, those of the other shift by one bank
  alignas(16) __shared__ float x[kTileC][kTileQ + 4];
  __shared__ float y[kTileC][kTileN + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_n = blockIdx.x * kTileN, first_q = blockIdx.y * kTileQ;
  query += blockIdx.z * query_b;
  features += blockIdx.z * features_b;
  float sum[kQueries][kKeys] = {};
  for (int c = 0; c < C; c += kTileC) {
    fill<kTileQ>(x, query, first_q, Q, query_q, c, C, query_c);
    fill<kTileN>(y, features, first_n, N, features_n, c, C, features_c);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kTileC; ++k) {
      const Pack<float, 4> low = load<4>(&x[k][warp * kQueries]), high = load<4>(&x[k][warp * kQueries + 4]);
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const float key = y[k][lane + 32 * j];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[i][j] = fmaf(low[i], key, sum[i][j]);
          sum[i + 4][j] = fmaf(high[i], key, sum[i + 4][j]);
        }
      }
    }
    __syncthreads();
  }
  const int num_words = ceil_div(N, 32), word = first_n / 32 + lane;
#pragma unroll
  for (int i = 0; i < kQueries; ++i) {
    const int q = first_q + warp * kQueries + i;
    uint32_t mine = 0, any = 0;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const uint32_t bits = __ballot_sync(kFullWarp, sum[i][j] >= 0.f && first_n + lane + 32 * j < N);
      any |= bits;
      if (lane == j) mine = bits;
    }
    const int64_t at = int64_t(blockIdx.z) * Q + q;
    if (q < Q && lane < kKeys && word < num_words) words[at * num_words + word] = mine;
    if (q < Q && lane == 0 && any) seen[at] = 1;  // whoever writes, writes the same
  }
}

}  // namespace
}  // namespace tarvis

int tarvis_mask_bits(tarvis_dtype dtype, const void* query, const void* features, uint32_t* words,
                     uint8_t* seen, int batch, int queries, int keys, int channels,
                     const int64_t query_stride[3], const int64_t features_stride[3], cudaStream_t stream) {
  using namespace tarvis;
  if (batch == 0 || queries == 0 || keys == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* of_input) {
    using T = std::remove_pointer_t<decltype(of_input)>;
    const dim3 grid(ceil_div(keys, kTileN), ceil_div(queries, kTileQ), batch);
    return launch(mask_bits<T>, grid, kThreads, stream, static_cast<const T*>(query),
                  static_cast<const T*>(features), words, seen, queries, keys, channels, query_stride[0],
                  query_stride[1], query_stride[2], features_stride[0], features_stride[1],
                  features_stride[2]);
  });
}

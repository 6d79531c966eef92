// Multi-scale deformable attention.
//
// Forward: a thread computes 16 bytes of channels of one (query, head). Samples run in a loop inside the
// thread, four corners each, one 16-byte load a corner, so that nothing passes between threads.
//
// Backward: a thread owns four channels, so that what it adds to the gradient of `value` is one 16-byte
// reduction (sm_90 and later). Per sample, three dot products with the incoming gradient are summed over the
// D / 4 lanes of a row: those of the value and of its derivatives in x and y. Softmax needs the weighted sum
// of the first over all samples, hence they wait in shared memory.
//
// Backward without atomics: the same kernel writes the bin of each sample (where its upper left corner lies)
// and the weights of its corners; the caller sorts; then a thread sums four channels of one (cell, head) over
// the samples in its four bins, in the order of the samples.

#include <limits.h>

#include "common.cuh"

namespace tarvis {
namespace {

using Size = tarvis_deform_attn;

constexpr int kForwardThreads = 128, kBackwardThreads = 128;
constexpr int kOwned = 4;  // channels a thread owns in the backward passes
constexpr int kMinLanes = 16 / kOwned;

// Places where the upper left corner of a sample may lie, -1 included, over all levels.
__host__ __device__ inline int64_t count_bins(const Size& size) {
  int64_t count = 0;
  for (int l = 0; l < size.levels; ++l) count += int64_t(size.height[l] + 1) * (size.width[l] + 1);
  return count;
}

// Everything about one (batch entry, query, head) but its channels.
template <typename Point>
struct Row {
  int query, head;
  int64_t index;  // of B * Q * A
  const Point* offset;
  const Point* logit;
  const float* ref;  // null: `own` is the place of the query
  float2 own;

  __device__ Row(const Size& size, int row, const Point* offsets, const Point* logits, const float* refs)
      : query(row / size.heads), head(row % size.heads), own{0.f, 0.f} {
    const int64_t b = blockIdx.y;
    const int samples = size.levels * size.points;
    index = b * size.queries * size.heads + row;
    offset = offsets + b * size.offset_b + query * size.offset_q + head * samples * 2;
    logit = logits + b * size.logit_b + query * size.logit_q + head * samples;
    ref = refs ? refs + b * size.ref_b + query * size.ref_q : nullptr;
    if (!refs && !size.classic) {
      int level = 0;
      for (int l = 1; l < size.levels; ++l)
        if (query >= size.start[l]) level = l;
      const int cell = query - size.start[level], w = size.width[level], y = cell / w;
      own = {(cell - y * w + 0.5f) / w, (y + 0.5f) / size.height[level]};
    }
  }

  // Where a sample lies without its offset, in pixels of the level.
  __device__ float2 origin(const Size& size, int level) const {
    if (size.classic) return {-0.5f, -0.5f};
    const float2 at = ref ? float2{ref[level * size.ref_l], ref[level * size.ref_l + 1]} : own;
    return {at.x * size.width[level] - 0.5f, at.y * size.height[level] - 0.5f};
  }

  __device__ float peak(const Size& size) const {
    float peak = -INFINITY;
    for (int s = 0; s < size.levels * size.points; ++s) peak = fmaxf(peak, widen(logit[s]));
    return peak;
  }
};

// A point between four cells.
struct Corners {
  int x, y;      // cell at the upper left, from -2 to one beyond the level
  float fx, fy;  // how far from it, 0..1
  bool left, right, up, down;  // which columns and rows of the four are inside

  __device__ Corners(float px, float py, int width, int height) {
    // fmaxf takes the other operand of NaN: what is not finite lies outside too
    px = fminf(fmaxf(px, -2.f), width + 1.f);
    py = fminf(fmaxf(py, -2.f), height + 1.f);
    const float lx = floorf(px), ly = floorf(py);
    fx = px - lx;
    fy = py - ly;
    x = static_cast<int>(lx);
    y = static_cast<int>(ly);
    left = x >= 0 && x < width;
    right = x >= -1 && x < width - 1;
    up = y >= 0 && y < height;
    down = y >= -1 && y < height - 1;
  }
};

template <int N, typename T>
__device__ inline void add(float (&sum)[N], float weight, const Pack<T, N>& x) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
}

template <int N, typename T>
__device__ inline float dot(const float (&a)[N], const Pack<T, N>& b) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fmaf(a[i], b[i], sum);
  return sum;
}

// Grid (rows, B), block (lanes of a row, rows).
template <typename T, typename Point>
__global__ void __launch_bounds__(kForwardThreads, 6)
    forward(const Size size, const T* __restrict__ value, const Point* __restrict__ offset,
            const Point* __restrict__ logit, const float* __restrict__ ref, T* __restrict__ out) {
  constexpr int N = 16 / sizeof(T);
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  if (index >= size.queries * size.heads) return;
  const Row<Point> row(size, index, offset, logit, ref);
  const int channel = threadIdx.x * N;
  const T* cells = value + blockIdx.y * size.value_b + row.head * size.channels + channel;
  const float peak = size.classic ? 0.f : row.peak(size);
  const Point* point = row.offset;
  const Point* score = row.logit;
  float sum[N] = {}, total = 0.f;
  for (int l = 0; l < size.levels; ++l) {
    const int w = size.width[l], h = size.height[l], down = w * size.value_s;
    const float2 origin = row.origin(size, l);
    const float2 scale = size.classic ? float2{float(w), float(h)} : float2{1.f, 1.f};
    const T* level = cells + size.start[l] * size.value_s;
#pragma unroll 2
    for (int p = 0; p < size.points; ++p, point += 2, ++score) {
      const Pack<Point, 2> xy = load<2>(point);
      const Corners at(fmaf(xy[0], scale.x, origin.x), fmaf(xy[1], scale.y, origin.y), w, h);
      const T* corner = level + (at.y * w + at.x) * size.value_s;
      const Pack<T, N> v00 = load_if<N>(at.up && at.left, corner);
      const Pack<T, N> v01 = load_if<N>(at.up && at.right, corner + size.value_s);
      const Pack<T, N> v10 = load_if<N>(at.down && at.left, corner + down);
      const Pack<T, N> v11 = load_if<N>(at.down && at.right, corner + down + size.value_s);
      const float z = widen(*score), e = size.classic ? z : __expf(z - peak);
      total += e;
      const float low = e * at.fy, high = e - low;
      add(sum, high - high * at.fx, v00);
      add(sum, high * at.fx, v01);
      add(sum, low - low * at.fx, v10);
      add(sum, low * at.fx, v11);
    }
  }
  const float scale = size.classic ? 1.f : 1.f / total;
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] *= scale;
  store(out + row.index * size.channels + channel, sum);
}

__device__ inline void add_atomically(float* to, float weight, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const float4 added = {weight * x[0], weight * x[1], weight * x[2], weight * x[3]};
  atomicAdd(reinterpret_cast<float4*>(to), added);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, weight * x[i]);
#endif
}

// Sum over the lanes of a row: 4, 8 or 16 neighbours.
__device__ inline float sum_lanes(float x, int lanes) {
  if (lanes > 8) x += __shfl_xor_sync(kFullWarp, x, 8);
  if (lanes > 4) x += __shfl_xor_sync(kFullWarp, x, 4);
  x += __shfl_xor_sync(kFullWarp, x, 2);
  return x + __shfl_xor_sync(kFullWarp, x, 1);
}

// Grid (rows, B), block (lanes of a row, rows).
template <typename T, typename Point>
__global__ void __launch_bounds__(kBackwardThreads, 5)
    backward(const Size size, const T* __restrict__ grad, const T* __restrict__ value,
             const Point* __restrict__ offset, const Point* __restrict__ logit, const float* __restrict__ ref,
             Point* __restrict__ grad_offset, Point* __restrict__ grad_logit, float* __restrict__ grad_value,
             int* __restrict__ bins, float* __restrict__ weights) {
  // padded: the same sample of several rows lies in several banks
  __shared__ float waiting[kBackwardThreads / kMinLanes][TARVIS_MAX_SAMPLES + 1];
  const int rows = size.queries * size.heads, samples = size.levels * size.points;
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  const bool live = index < rows;  // all lanes take part in the shuffles, but only these write
  const Row<Point> row(size, live ? index : rows - 1, offset, logit, ref);
  const int lane = threadIdx.x, lanes = blockDim.x;
  const int channel = row.head * size.channels + lane * kOwned;
  const T* cells = value + blockIdx.y * size.value_b + channel;
  const int grad_s = size.heads * size.channels;
  const int64_t grad_b = int64_t(blockIdx.y) * size.cells * grad_s + channel;
  const Pack<T, kOwned> incoming = load<kOwned>(grad + row.index * size.channels + lane * kOwned);
  float g[kOwned];
#pragma unroll
  for (int i = 0; i < kOwned; ++i) g[i] = incoming[i];

  const float peak = size.classic ? 0.f : row.peak(size);
  float total = size.classic ? 1.f : 0.f;
  if (!size.classic)
    for (int s = 0; s < samples; ++s) total += __expf(widen(row.logit[s]) - peak);
  const float inverse = 1.f / total;

  float mean = 0.f;  // sum of weight * (gradient of weight): what softmax takes off
  int first_bin = (blockIdx.y * size.heads + row.head) * int(count_bins(size));
  for (int l = 0, s = 0; l < size.levels; ++l) {
    const int w = size.width[l], h = size.height[l], start = size.start[l];
    const float2 origin = row.origin(size, l);
    const float2 scale = size.classic ? float2{float(w), float(h)} : float2{1.f, 1.f};
    for (int p = 0; p < size.points; ++p, ++s) {
      const Pack<Point, 2> xy = load<2>(row.offset + 2 * s);
      const Corners at(fmaf(xy[0], scale.x, origin.x), fmaf(xy[1], scale.y, origin.y), w, h);
      const int cell = start + at.y * w + at.x;
      const bool in00 = at.up && at.left, in01 = at.up && at.right;
      const bool in10 = at.down && at.left, in11 = at.down && at.right;
      const T* corner = cells + cell * size.value_s;
      const float d00 = dot(g, load_if<kOwned>(in00, corner));
      const float d01 = dot(g, load_if<kOwned>(in01, corner + size.value_s));
      const float d10 = dot(g, load_if<kOwned>(in10, corner + w * size.value_s));
      const float d11 = dot(g, load_if<kOwned>(in11, corner + (w + 1) * size.value_s));
      const float z = widen(row.logit[s]), weight = size.classic ? z : __expf(z - peak) * inverse;

      const float top = fmaf(at.fx, d01 - d00, d00), bottom = fmaf(at.fx, d11 - d10, d10);
      const float by_weight = sum_lanes(fmaf(at.fy, bottom - top, top), lanes);
      const float by_x = sum_lanes(fmaf(at.fy, (d11 - d10) - (d01 - d00), d01 - d00), lanes);
      const float by_y = sum_lanes(bottom - top, lanes);
      mean = fmaf(weight, by_weight, mean);
      if (live && lane == 0) {
        waiting[threadIdx.y][s] = by_weight;
        store(grad_offset + (row.index * samples + s) * 2,
              {weight * scale.x * by_x, weight * scale.y * by_y});
      }

      const float low = weight * at.fy, high = weight - low;
      const float w01 = high * at.fx, w00 = high - w01, w11 = low * at.fx, w10 = low - w11;
      if (grad_value) {
        float* to = grad_value + grad_b + cell * grad_s;
        if (live && in00) add_atomically(to, w00, g);
        if (live && in01) add_atomically(to + grad_s, w01, g);
        if (live && in10) add_atomically(to + w * grad_s, w10, g);
        if (live && in11) add_atomically(to + (w + 1) * grad_s, w11, g);
      } else if (live && lane == 0) {
        const int64_t sample = row.index * samples + s;
        const bool reads = (at.left || at.right) && (at.up || at.down);
        bins[sample] = reads ? first_bin + (at.y + 1) * (w + 1) + at.x + 1 : INT_MAX;
        store(weights + 4 * sample, {w00, w01, w10, w11});
      }
    }
    first_bin += (h + 1) * (w + 1);
  }

  __syncwarp();
  if (live)
    for (int s = lane; s < samples; s += lanes) {
      const float z = widen(row.logit[s]), by_weight = waiting[threadIdx.y][s];
      const float by_logit = size.classic ? by_weight : __expf(z - peak) * inverse * (by_weight - mean);
      grad_logit[row.index * samples + s] = narrow<Point>(by_logit);
    }
}

// Grid (cells and heads, B), block (lanes of a row, rows).
template <typename T>
__global__ void __launch_bounds__(kBackwardThreads, 5)
    gather(const Size size, const T* __restrict__ grad, const int64_t* __restrict__ order,
           const int* __restrict__ first, const float* __restrict__ weight, T* __restrict__ grad_value) {
  const int index = blockIdx.x * blockDim.y + threadIdx.y;
  if (index >= size.cells * size.heads) return;
  const int cell = index / size.heads, head = index % size.heads;
  const unsigned samples = size.levels * size.points;
  int level = 0, bin = (blockIdx.y * size.heads + head) * int(count_bins(size));
  for (int l = 1; l < size.levels; ++l)
    if (cell >= size.start[l]) {
      level = l;
      bin += (size.height[l - 1] + 1) * (size.width[l - 1] + 1);
    }
  const int across = size.width[level] + 1;
  const int y = (cell - size.start[level]) / size.width[level];
  const int x = cell - size.start[level] - y * size.width[level];
  bin += (y + 1) * across + x + 1;  // of samples whose upper left corner is this cell
  const T* rows = grad + threadIdx.x * kOwned;
  float sum[kOwned] = {};
#pragma unroll 1
  for (int corner = 0; corner < 4; ++corner) {
    const int from = bin - (corner >> 1) * across - (corner & 1);
    const int end = first[from + 1];
    for (int i = first[from]; i < end; ++i) {
      const unsigned sample = static_cast<unsigned>(order[i]);
      const int64_t row = sample / samples;
      add(sum, weight[4 * int64_t(sample) + corner], load<kOwned>(rows + row * size.channels));
    }
  }
  const int64_t out = (int64_t(blockIdx.y) * size.cells * size.heads + index) * size.channels;
  store(grad_value + out + threadIdx.x * kOwned, sum);
}

// Calls f with null pointers to the types of values and of offsets.
template <typename F>
int with_types(const Size& size, F f) {
  return with_type(size.value_dtype, [&](auto* value) {
    if (size.point_dtype == size.value_dtype) return f(value, value);
    return f(value, static_cast<float*>(nullptr));
  });
}

// Blocks over `rows` of one batch entry, `lanes` threads each.
template <typename... Parameters, typename... Arguments>
int launch_rows(void (*kernel)(Parameters...), int threads, int lanes, int rows, int batch,
                cudaStream_t stream, const Arguments&... arguments) {
  if (rows == 0 || batch == 0) return cudaSuccess;
  const dim3 block(lanes, threads / lanes), grid(ceil_div<int64_t>(rows, block.y), batch);
  return launch(kernel, grid, block, stream, arguments...);
}

}  // namespace
}  // namespace tarvis

int tarvis_ms_deform_attn(const tarvis_deform_attn* size, const void* value, const void* offset,
                          const void* logit, const float* ref, void* out, cudaStream_t stream) {
  using namespace tarvis;
  return with_types(*size, [&](auto* of_value, auto* of_point) {
    using T = std::remove_pointer_t<decltype(of_value)>;
    using Point = std::remove_pointer_t<decltype(of_point)>;
    const int lanes = size->channels * sizeof(T) / 16;
    return launch_rows(forward<T, Point>, kForwardThreads, lanes, size->queries * size->heads, size->batch,
                       stream, *size, static_cast<const T*>(value), static_cast<const Point*>(offset),
                       static_cast<const Point*>(logit), ref, static_cast<T*>(out));
  });
}

int tarvis_ms_deform_attn_backward(const tarvis_deform_attn* size, const void* grad, const void* value,
                                   const void* offset, const void* logit, const float* ref,
                                   void* grad_offset, void* grad_logit, float* grad_value, int* bin,
                                   float* weight, cudaStream_t stream) {
  using namespace tarvis;
  return with_types(*size, [&](auto* of_value, auto* of_point) {
    using T = std::remove_pointer_t<decltype(of_value)>;
    using Point = std::remove_pointer_t<decltype(of_point)>;
    return launch_rows(backward<T, Point>, kBackwardThreads, size->channels / kOwned,
                       size->queries * size->heads, size->batch, stream, *size, static_cast<const T*>(grad),
                       static_cast<const T*>(value), static_cast<const Point*>(offset),
                       static_cast<const Point*>(logit), ref, static_cast<Point*>(grad_offset),
                       static_cast<Point*>(grad_logit), grad_value, bin, weight);
  });
}

int64_t tarvis_ms_deform_attn_bins(const tarvis_deform_attn* size) { return tarvis::count_bins(*size); }

int tarvis_ms_deform_attn_gather(const tarvis_deform_attn* size, const void* grad, const int64_t* order,
                                 const int* first, const float* weight, void* grad_value,
                                 cudaStream_t stream) {
  using namespace tarvis;
  return with_type(size->value_dtype, [&](auto* of_value) {
    using T = std::remove_pointer_t<decltype(of_value)>;
    return launch_rows(gather<T>, kBackwardThreads, size->channels / kOwned, size->cells * size->heads,
                       size->batch, stream, *size, static_cast<const T*>(grad), order, first, weight,
                       static_cast<T*>(grad_value));
  });
}

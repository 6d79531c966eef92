// Masks and labels at the size of the image, from logits at a quarter of the network's input.
//
// A thread goes down a few rows of one column. It keeps three input rows, interpolated across, in registers:
// rows of the output that lie between the same rows of the input share them.

#include <limits.h>

#include "common.cuh"

namespace tarvis {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 8;  // of a thread

struct Weights {
  float at[3];

  __device__ Weights(const tarvis_axis& axis, int i) {
#pragma unroll
    for (int j = 0; j < 3; ++j) at[j] = axis.weight[3 * i + j];
  }

  __device__ float sum(float a, float b, float c) const { return fmaf(at[0], a, fmaf(at[1], b, at[2] * c)); }
};

// Output column x of one map.
template <typename T>
class Column {
  const T* map_;
  int height_, width_, input_[3];
  Weights weight_;
  int first_ = INT_MIN;  // input row that `row_` begins with; none yet
  float row_[3];

  __device__ static int clamped(int i, int size) { return max(0, min(i, size - 1)); }

  __device__ float across(int y) const {
    const T* row = map_ + int64_t(clamped(y, height_)) * width_;
    return weight_.sum(widen(row[input_[0]]), widen(row[input_[1]]), widen(row[input_[2]]));
  }

 public:
  __device__ Column(const tarvis_axis& y, const tarvis_axis& x, int column)
      : map_(nullptr), height_(y.inputs), width_(x.inputs), weight_(x, column) {
#pragma unroll
    for (int j = 0; j < 3; ++j) input_[j] = clamped(x.start[column] + j, x.inputs);
  }

  __device__ void read_from(const T* map) {
    map_ = map;
    first_ = INT_MIN;
  }

  // The value at an output row; all threads of a block ask for the same.
  __device__ float at(int start, const Weights& weight) {
    if (start != first_) {
      const bool next = start == first_ + 1;  // two of the rows are here already
      row_[0] = next ? row_[1] : across(start);
      row_[1] = next ? row_[2] : across(start + 1);
      row_[2] = across(start + 2);
      first_ = start;
    }
    return weight.sum(row_[0], row_[1], row_[2]);
  }
};

// Grid (maps, strips of rows, strips of columns). `out` is bytes or words.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_upsample(const T* __restrict__ logits, void* __restrict__ out, const tarvis_axis y,
                  const tarvis_axis x, int packed) {
  const int64_t map = blockIdx.x;
  const int column = blockIdx.z * kThreads + threadIdx.x, first = blockIdx.y * kRows;
  const int last = min(first + kRows, y.outputs);
  Column<T> values(y, x, min(column, x.outputs - 1));
  values.read_from(logits + map * y.inputs * x.inputs);
#pragma unroll 1
  for (int row = first; row < last; ++row) {
    const bool inside = column < x.outputs;
    const bool positive = values.at(y.start[row], Weights(y, row)) > 0.f;
    if (packed) {
      const uint32_t bits = __ballot_sync(kFullWarp, inside && positive);
      const int words = ceil_div(x.outputs, 32);
      if (inside && threadIdx.x % 32 == 0)
        static_cast<uint32_t*>(out)[(map * y.outputs + row) * words + column / 32] = bits;
    } else if (inside) {
      static_cast<uint8_t*>(out)[(map * y.outputs + row) * x.outputs + column] = positive;
    }
  }
}

// Grid (frames, strips of rows, strips of columns).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    label_upsample(const T* __restrict__ logits, void* __restrict__ out, int maps, int frames,
                   const tarvis_axis y, const tarvis_axis x, int background, int wide) {
  // each thread its own column of these: in registers they need a loop over rows that is unrolled, and spill
  __shared__ float best[kRows][kThreads];
  __shared__ int label[kRows][kThreads];
  const int64_t frame = blockIdx.x;
  const int thread = threadIdx.x, column = blockIdx.z * kThreads + thread;
  const int first = blockIdx.y * kRows, rows = min(kRows, y.outputs - first);
  if (column >= x.outputs) return;
  for (int i = 0; i < rows; ++i) {
    best[i][thread] = background ? 0.f : -INFINITY;
    label[i][thread] = 0;
  }
  Column<T> values(y, x, column);
#pragma unroll 1
  for (int k = 0; k < maps; ++k) {
    values.read_from(logits + (k * int64_t(frames) + frame) * y.inputs * x.inputs);
#pragma unroll 1
    for (int i = 0; i < rows; ++i) {
      const float value = values.at(y.start[first + i], Weights(y, first + i));
      if (value > best[i][thread]) {
        best[i][thread] = value;
        label[i][thread] = k + background;
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    const int64_t at = (frame * y.outputs + first + i) * x.outputs + column;
    if (wide)
      static_cast<int16_t*>(out)[at] = static_cast<int16_t>(label[i][thread]);
    else
      static_cast<uint8_t*>(out)[at] = static_cast<uint8_t>(label[i][thread]);
  }
}

dim3 grid_of(int maps, const tarvis_axis& y, const tarvis_axis& x) {
  return dim3(maps, ceil_div(y.outputs, kRows), ceil_div(x.outputs, kThreads));
}

}  // namespace
}  // namespace tarvis

int tarvis_mask_upsample(tarvis_dtype dtype, const void* logits, void* out, int maps, tarvis_axis y,
                         tarvis_axis x, int packed, cudaStream_t stream) {
  using namespace tarvis;
  if (maps == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* of_logits) {
    using T = std::remove_pointer_t<decltype(of_logits)>;
    return launch(mask_upsample<T>, grid_of(maps, y, x), kThreads, stream,
                  static_cast<const T*>(logits), out, y, x, packed);
  });
}

int tarvis_label_upsample(tarvis_dtype dtype, const void* logits, void* out, int maps, int frames,
                          tarvis_axis y, tarvis_axis x, int background, int wide, cudaStream_t stream) {
  using namespace tarvis;
  if (frames == 0) return cudaSuccess;
  return with_type(dtype, [&](auto* of_logits) {
    using T = std::remove_pointer_t<decltype(of_logits)>;
    return launch(label_upsample<T>, grid_of(frames, y, x), kThreads, stream,
                  static_cast<const T*>(logits), out, maps, frames, y, x, background, wide);
  });
}

// The part of CUDA that the kernels use, for a plain C++ compiler: they run on the CPU, thread by thread.
//
// The threads of a block are fibres that take turns: one runs until it ends or waits for others at a barrier,
// a shuffle or a ballot. If none can go on, the launch fails, so that a barrier which not all threads reach
// shows. Every other launch runs its blocks from the last to the first: sums by atomics change as on a GPU.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    default: return "threads wait for each other forever";
  }
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

// A group of threads that wait for each other. Values lie in two places that take turns: a thread can be one
// step ahead of another.
struct Group {
  std::vector<uint64_t> arrived;
  std::vector<uint32_t> value[2];
  explicit Group(size_t threads) : arrived(threads) { value[0].resize(threads), value[1].resize(threads); }
};

class Block {
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    dim3 index;
    bool done;
  };
  static constexpr size_t kStack = 128 << 10;

  std::vector<Fibre> fibres_;
  std::vector<Group> warps_;
  Group all_{0};
  ucontext_t scheduler_;
  std::function<void()> kernel_;
  size_t current_ = 0;
  uint64_t progress_ = 0;

  static void enter() {
    Block& block = instance();
    block.kernel_();
    block.fibres_[block.current_].done = true;
    ++block.progress_;
    swapcontext(&block.fibres_[block.current_].context, &block.scheduler_);
  }

  // Leaves `value` and waits until all threads of the group have come as far; returns everybody's values.
  const std::vector<uint32_t>& meet(Group& group, size_t member, uint32_t value) {
    const uint64_t step = ++group.arrived[member];
    std::vector<uint32_t>& values = group.value[step % 2];
    values[member] = value;
    ++progress_;
    while (*std::min_element(group.arrived.begin(), group.arrived.end()) < step)
      swapcontext(&fibres_[current_].context, &scheduler_);
    return values;
  }

 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  const std::vector<uint32_t>& meet_warp(uint32_t value) {
    return meet(warps_[current_ / 32], current_ % 32, value);
  }
  void meet_block() { meet(all_, current_, 0); }
  size_t lane() const { return current_ % 32; }

  cudaError_t run(const dim3& size, std::function<void()> kernel) {
    const size_t threads = size_t(size.x) * size.y * size.z;
    if (threads == 0 || threads > 1024 || threads % 32) return cudaErrorInvalidConfiguration;
    kernel_ = std::move(kernel);
    fibres_.resize(std::max(fibres_.size(), threads));
    warps_.assign(threads / 32, Group(32));
    all_ = Group(threads);
    for (size_t i = 0; i < threads; ++i) {
      Fibre& fibre = fibres_[i];
      fibre.index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
      fibre.done = false;
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStack;
      fibre.context.uc_link = nullptr;
      makecontext(&fibre.context, &Block::enter, 0);
    }
    for (bool running = true; running;) {
      const uint64_t before = progress_;
      running = false;
      for (current_ = 0; current_ < threads; ++current_) {
        if (fibres_[current_].done) continue;
        running = true;
        threadIdx = fibres_[current_].index;
        swapcontext(&scheduler_, &fibres_[current_].context);
      }
      if (running && progress_ == before) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
  }
};

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (!gridDim.x || !gridDim.y || !gridDim.z || gridDim.y > 65535 || gridDim.z > 65535)
    return cudaErrorInvalidConfiguration;
  static bool backwards = false;
  backwards = !backwards;
  const size_t blocks = size_t(gridDim.x) * gridDim.y * gridDim.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t block = backwards ? blocks - 1 - i : i;
    blockIdx = dim3(block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y);
    const cudaError_t error = cuda_on_cpu::Block::instance().run(blockDim, [&] { kernel(arguments...); });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_cpu::Block::instance().meet_block(); }
inline void __syncwarp() { cuda_on_cpu::Block::instance().meet_warp(0); }

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  uint32_t bits = 0;
  const std::vector<uint32_t>& all = cuda_on_cpu::Block::instance().meet_warp(predicate);
  for (int lane = 0; lane < 32; ++lane) bits |= all[lane] << lane;
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  cuda_on_cpu::Block& block = cuda_on_cpu::Block::instance();
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return __uint_as_float(block.meet_warp(bits)[block.lane() ^ mask]);
}

inline float atomicAdd(float* to, float value) { return std::exchange(*to, *to + value); }
inline float __expf(float x) { return std::exp(x); }

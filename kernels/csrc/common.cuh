// What the kernels share: rows of values in registers, and launching.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "tarvis_kernels.h"

namespace tarvis {

constexpr unsigned kFullWarp = 0xffffffffu;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// One half of a word.
template <typename T>
__device__ float widen_half(uint32_t word, bool upper);
template <>
__device__ inline float widen_half<__half>(uint32_t word, bool upper) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? word >> 16 : word)));
}
template <>
__device__ inline float widen_half<__nv_bfloat16>(uint32_t word, bool upper) {
  return __uint_as_float(upper ? word & 0xffff0000u : word << 16);  // one instruction, a conversion takes two
}

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// N neighbours in memory, moved by one instruction; words, so that the halves of one stay in one register.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  uint32_t words[N * sizeof(T) / 4];

  __device__ float operator[](int i) const { return widen_half<T>(words[i / 2], i % 2); }
};

template <int N>
struct alignas(N * sizeof(float)) Pack<float, N> {
  float values[N];

  __device__ float operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ inline Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// Zeros where there is nothing to load.
template <int N, typename T>
__device__ inline Pack<T, N> load_if(bool there, const T* from) {
  return there ? load<N>(from) : Pack<T, N>{};
}

template <int N, typename T>
__device__ inline void store(T* to, const float (&x)[N]) {
  struct alignas(N * sizeof(T)) {
    T at[N];
  } pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.at[i] = narrow<T>(x[i]);
  *reinterpret_cast<decltype(pack)*>(to) = pack;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
           const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Calls f with a null pointer to the type of `dtype`, from which it takes its template arguments.
template <typename F>
int with_type(tarvis_dtype dtype, F f) {
  switch (dtype) {
    case TARVIS_FLOAT32: return f(static_cast<float*>(nullptr));
    case TARVIS_FLOAT16: return f(static_cast<__half*>(nullptr));
    case TARVIS_BFLOAT16: return f(static_cast<__nv_bfloat16*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

}  // namespace tarvis

#pragma once

#include <torch/headeronly/util/Half.h>

using __half = c10::Half;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half __ushort_as_half(unsigned short bits) { return __half(bits, __half::from_bits()); }

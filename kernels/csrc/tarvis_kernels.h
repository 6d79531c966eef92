// C interface of the CUDA kernels: device pointers, sizes and a stream; nothing of PyTorch.
//
// Strides count elements. Sizes are not checked here beyond what a launch needs: that is the caller's part.
// Those that are int are at most INT_MAX - 1023.
// Every function queues its work on `stream` and returns a cudaError_t of the launch.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { TARVIS_FLOAT32, TARVIS_FLOAT16, TARVIS_BFLOAT16 } tarvis_dtype;

enum { TARVIS_MAX_LEVELS = 4, TARVIS_MAX_SAMPLES = 32 };

// Multi-scale deformable attention; the formula is in kernels/ms_deform_attn.py.
//   value  [B, S, A, D], rows of A*D contiguous, D = 16, 32 or 64; pointer and strides: multiples of 16 bytes
//   offset [B, Q, A, L, P, 2], rows of A*L*P*2 contiguous; pointer and strides: multiples of two elements
//   logit  [B, Q, A, L, P], rows of A*L*P contiguous
//   ref    [B, Q, L, 2] float32, or null: query q sits at the centre of cell q
// In classic form `offset` holds locations in 0..1, `logit` finished weights, and `ref` is null.
// Offsets and logits have the dtype of the values or float32. S * value_s, Q * A and B * Q * A * L * P are
// below 2^31, B is at most 65535.
typedef struct {
  int batch, cells, queries, heads, channels, levels, points;
  int height[TARVIS_MAX_LEVELS], width[TARVIS_MAX_LEVELS];
  int start[TARVIS_MAX_LEVELS];  // first cell of each level
  int classic;
  tarvis_dtype value_dtype, point_dtype;
  int value_s, ref_l;  // strides
  int64_t value_b, offset_b, offset_q, logit_b, logit_q, ref_b, ref_q;
} tarvis_deform_attn;

// out [B, Q, A*D] in the dtype of `value`.
int tarvis_ms_deform_attn(const tarvis_deform_attn* size, const void* value, const void* offset,
                          const void* logit, const float* ref, void* out, cudaStream_t stream);

// Gradients with respect to offset and logit (contiguous, in their dtype), and, in one of two ways, to value:
//   grad_value [B, S, A, D] float32 zeros: added to by atomics, in an order that changes from run to run;
//   or, where it is null, `bin` [B*Q*A*L*P] and `weight` [B*Q*A*L*P, 4]: the bin that each sample falls into
//   (INT_MAX where it reads nothing) and the weights of its four corners, for tarvis_ms_deform_attn_gather.
int tarvis_ms_deform_attn_backward(const tarvis_deform_attn* size, const void* grad, const void* value,
                                   const void* offset, const void* logit, const float* ref,
                                   void* grad_offset, void* grad_logit, float* grad_value, int* bin,
                                   float* weight, cudaStream_t stream);

// Bins of one (batch entry, head): one for each place of a sample's upper left corner, -1 included; those of
// a level in rows of width + 1, levels one after the other. The bins of all are numbered through.
int64_t tarvis_ms_deform_attn_bins(const tarvis_deform_attn* size);

// grad_value [B, S, A, D] in the dtype of `value`, summed in the order of the samples.
//   grad  [B, Q, A*D] contiguous, as in the backward pass
//   order [B*Q*A*L*P]: samples sorted by bin, stably
//   first [B*A*bins + 1]: where in `order` each bin begins
int tarvis_ms_deform_attn_gather(const tarvis_deform_attn* size, const void* grad, const int64_t* order,
                                 const int* first, const float* weight, void* grad_value,
                                 cudaStream_t stream);

// Signs of query [B, Q, C] times features [B, C, N], both of one dtype and with any strides (of b, q, c and
// of b, c, n): words [B, Q, ceil(N / 32)], and seen [B, Q], bytes that are zero before. B is at most 65535,
// Q at most 64 * 65535.
int tarvis_mask_bits(tarvis_dtype dtype, const void* query, const void* features, uint32_t* words,
                     uint8_t* seen, int batch, int queries, int keys, int channels,
                     const int64_t query_stride[3], const int64_t features_stride[3], cudaStream_t stream);

// One axis of the upsampling: output i = sum over j < 3 of weight[i][j] * input[start[i] + j]. Weights of
// inputs before the first and beyond the last are zero.
typedef struct {
  int inputs, outputs;
  const int* start;
  const float* weight;
} tarvis_axis;

// logits [M, h, w] -> out [M, H, W] bytes 0 or 1, or [M, H, ceil(W / 32)] words of bits where packed.
int tarvis_mask_upsample(tarvis_dtype dtype, const void* logits, void* out, int maps, tarvis_axis y,
                         tarvis_axis x, int packed, cudaStream_t stream);

// logits [K, T, h, w] -> out [T, H, W]: the first map with the largest value, as uint8 or, where wide, int16.
// With background, 0 means that no value is positive and map k has label k + 1.
int tarvis_label_upsample(tarvis_dtype dtype, const void* logits, void* out, int maps, int frames,
                          tarvis_axis y, tarvis_axis x, int background, int wide, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

// PyTorch operators over the C interface, through PyTorch's stable ABI: one binary for several versions.
//
// kernels/_cuda.py checks, allocates and makes contiguous; here tensors become pointers, sizes and strides.
// What would end in wrong memory is checked here once more: devices, alignment, sizes.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "tarvis_kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Argument {
  const char* name;
  const Tensor* tensor;
  size_t alignment;  // in bytes, of its first element

  Argument(const char* name, const Tensor& tensor, size_t alignment = 1)
      : name(name), tensor(&tensor), alignment(alignment) {}
  Argument(const char* name, const std::optional<Tensor>& tensor, size_t alignment = 1)
      : name(name), tensor(tensor ? &*tensor : nullptr), alignment(alignment) {}
};

// Makes the device that all tensors are on the current one and finds PyTorch's stream there.
class Device {
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cudaStream_t stream;

  explicit Device(std::initializer_list<Argument> arguments)
      : guard_(arguments.begin()->tensor->get_device_index()) {
    const Argument& first = *arguments.begin();
    for (const Argument& argument : arguments) {
      if (!argument.tensor) continue;
      STD_TORCH_CHECK(argument.tensor->device() == first.tensor->device(), argument.name,
                      " is not on the device of ", first.name);
      const auto address = reinterpret_cast<uintptr_t>(argument.tensor->const_data_ptr());
      STD_TORCH_CHECK(address % argument.alignment == 0, argument.name, " does not begin at a multiple of ",
                      argument.alignment, " bytes");
    }
    void* current = nullptr;
    const AOTITorchError error =
        aoti_torch_get_current_cuda_stream(first.tensor->get_device_index(), &current);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "PyTorch has no current stream");
    stream = static_cast<cudaStream_t>(current);
  }
};

// A size for the kernels, which count in 32 bits; what is left free lets them round up to whole blocks.
int size32(int64_t size) {
  STD_TORCH_CHECK(size >= 0 && size <= std::numeric_limits<int>::max() - 1023, "a size of ", size,
                  " is more than the kernels can count");
  return static_cast<int>(size);
}

void check(int error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

tarvis_dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return TARVIS_FLOAT32;
    case ScalarType::Half: return TARVIS_FLOAT16;
    case ScalarType::BFloat16: return TARVIS_BFLOAT16;
    default: STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16");
  }
}

template <typename T>
const T* input(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

template <typename T>
const T* input(const std::optional<Tensor>& tensor) { return tensor ? input<T>(*tensor) : nullptr; }

template <typename T>
T* output(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

template <typename T>
T* output(const std::optional<Tensor>& tensor) { return tensor ? output<T>(*tensor) : nullptr; }

// shapes: h0, w0, h1, w1, ..
tarvis_deform_attn size_of(const Tensor& value, const Tensor& offset, const Tensor& logit,
                           const std::optional<Tensor>& ref, const std::vector<int64_t>& shapes,
                           bool classic) {
  tarvis_deform_attn size = {};
  size.batch = size32(value.size(0));
  size.cells = size32(value.size(1));
  size.heads = size32(value.size(2));
  size.channels = size32(value.size(3));
  size.queries = size32(logit.size(1));
  size.levels = size32(logit.size(3));
  size.points = size32(logit.size(4));
  size32(int64_t(size.queries) * size.heads);
  size32(value.size(1) * value.stride(1));
  STD_TORCH_CHECK(size.levels <= TARVIS_MAX_LEVELS && size.levels * size.points <= TARVIS_MAX_SAMPLES &&
                      shapes.size() == 2 * size_t(size.levels),
                  "levels or points that the kernels cannot take");
  int start = 0;
  for (int l = 0; l < size.levels; ++l) {
    size.height[l] = size32(shapes[2 * l]);
    size.width[l] = size32(shapes[2 * l + 1]);
    size.start[l] = start;
    start = size32(start + int64_t(size.height[l]) * size.width[l]);
  }
  STD_TORCH_CHECK(start == size.cells, "levels of ", start, " cells, but values of ", size.cells);
  size.classic = classic;
  size.value_dtype = dtype_of(value);
  size.point_dtype = dtype_of(offset);
  size.value_b = value.stride(0);
  size.value_s = value.stride(1);
  size.offset_b = offset.stride(0);
  size.offset_q = offset.stride(1);
  size.logit_b = logit.stride(0);
  size.logit_q = logit.stride(1);
  if (ref) {
    size.ref_b = ref->stride(0);
    size.ref_q = ref->stride(1);
    size.ref_l = size32(ref->stride(2));
  }
  return size;
}

void ms_deform_attn(Tensor value, Tensor offset, Tensor logit, std::optional<Tensor> ref,
                    std::vector<int64_t> shapes, bool classic, Tensor out) {
  const Device device({{"value", value, 16},
                       {"offset", offset, 2 * offset.element_size()},
                       {"logit", logit},
                       {"ref", ref},
                       {"out", out, 16}});
  const tarvis_deform_attn size = size_of(value, offset, logit, ref, shapes, classic);
  check(tarvis_ms_deform_attn(&size, input<void>(value), input<void>(offset), input<void>(logit),
                              input<float>(ref), output<void>(out), device.stream),
        "ms_deform_attn");
}

void ms_deform_attn_backward(Tensor grad, Tensor value, Tensor offset, Tensor logit,
                             std::optional<Tensor> ref, std::vector<int64_t> shapes, bool classic,
                             Tensor grad_offset, Tensor grad_logit, std::optional<Tensor> grad_value,
                             std::optional<Tensor> bin, std::optional<Tensor> weight) {
  const Device device({{"value", value, 16},
                       {"grad", grad, 16},
                       {"offset", offset, 2 * offset.element_size()},
                       {"logit", logit},
                       {"ref", ref},
                       {"grad_offset", grad_offset, 2 * grad_offset.element_size()},
                       {"grad_logit", grad_logit},
                       {"grad_value", grad_value, 16},
                       {"bin", bin},
                       {"weight", weight, 16}});
  const tarvis_deform_attn size = size_of(value, offset, logit, ref, shapes, classic);
  check(tarvis_ms_deform_attn_backward(
            &size, input<void>(grad), input<void>(value), input<void>(offset), input<void>(logit),
            input<float>(ref), output<void>(grad_offset), output<void>(grad_logit), output<float>(grad_value),
            output<int>(bin), output<float>(weight), device.stream),
        "ms_deform_attn_backward");
}

void ms_deform_attn_gather(Tensor grad, Tensor value, Tensor logit, std::vector<int64_t> shapes, Tensor order,
                           Tensor first, Tensor weight, Tensor grad_value) {
  const Device device({{"value", value},
                       {"grad", grad, 16},
                       {"logit", logit},
                       {"order", order},
                       {"first", first},
                       {"weight", weight, 16},
                       {"grad_value", grad_value, 16}});
  const tarvis_deform_attn size = size_of(value, logit, logit, std::nullopt, shapes, false);
  check(tarvis_ms_deform_attn_gather(&size, input<void>(grad), input<int64_t>(order), input<int>(first),
                                     input<float>(weight), output<void>(grad_value), device.stream),
        "ms_deform_attn_gather");
}

void mask_bits(Tensor query, Tensor features, Tensor words, Tensor seen) {
  const Device device({{"query", query}, {"features", features}, {"words", words}, {"seen", seen}});
  const tarvis_dtype dtype = dtype_of(query);
  STD_TORCH_CHECK(dtype == dtype_of(features), "query and features have two dtypes");
  const int64_t query_stride[] = {query.stride(0), query.stride(1), query.stride(2)};
  const int64_t features_stride[] = {features.stride(0), features.stride(1), features.stride(2)};
  check(tarvis_mask_bits(dtype, input<void>(query), input<void>(features), output<uint32_t>(words),
                         output<uint8_t>(seen), size32(query.size(0)), size32(query.size(1)),
                         size32(features.size(2)), size32(query.size(2)), query_stride, features_stride,
                         device.stream),
        "mask_bits");
}

tarvis_axis axis(int64_t inputs, const Tensor& start, const Tensor& weight) {
  return {size32(inputs), size32(start.size(0)), input<int>(start), input<float>(weight)};
}

void mask_upsample(Tensor logits, Tensor y_start, Tensor y_weight, Tensor x_start, Tensor x_weight,
                   bool packed, Tensor out) {
  const Device device({{"logits", logits},
                       {"y_start", y_start},
                       {"y_weight", y_weight},
                       {"x_start", x_start},
                       {"x_weight", x_weight},
                       {"out", out}});
  check(tarvis_mask_upsample(dtype_of(logits), input<void>(logits), output<void>(out),
                             size32(logits.size(0) * logits.size(1)), axis(logits.size(2), y_start, y_weight),
                             axis(logits.size(3), x_start, x_weight), packed, device.stream),
        "mask_upsample");
}

void label_upsample(Tensor logits, Tensor y_start, Tensor y_weight, Tensor x_start, Tensor x_weight,
                    bool background, Tensor out) {
  const Device device({{"logits", logits},
                       {"y_start", y_start},
                       {"y_weight", y_weight},
                       {"x_start", x_start},
                       {"x_weight", x_weight},
                       {"out", out}});
  check(tarvis_label_upsample(dtype_of(logits), input<void>(logits), output<void>(out),
                              size32(logits.size(0)), size32(logits.size(1)),
                              axis(logits.size(2), y_start, y_weight),
                              axis(logits.size(3), x_start, x_weight), background,
                              out.scalar_type() == ScalarType::Short, device.stream),
        "label_upsample");
}

}  // namespace

STABLE_TORCH_LIBRARY(tarvis_cuda, m) {
  m.def(
      "ms_deform_attn(Tensor value, Tensor offset, Tensor logit, Tensor? ref, int[] shapes, bool classic, "
      "Tensor(a!) out) -> ()");
  m.def(
      "ms_deform_attn_backward(Tensor grad, Tensor value, Tensor offset, Tensor logit, Tensor? ref, "
      "int[] shapes, bool classic, Tensor(a!) grad_offset, Tensor(b!) grad_logit, "
      "Tensor(c!)? grad_value, Tensor(d!)? bin, Tensor(e!)? weight) -> ()");
  m.def(
      "ms_deform_attn_gather(Tensor grad, Tensor value, Tensor logit, int[] shapes, Tensor order, "
      "Tensor first, Tensor weight, Tensor(a!) grad_value) -> ()");
  m.def("mask_bits(Tensor query, Tensor features, Tensor(a!) words, Tensor(b!) seen) -> ()");
  m.def(
      "mask_upsample(Tensor logits, Tensor y_start, Tensor y_weight, Tensor x_start, Tensor x_weight, "
      "bool packed, Tensor(a!) out) -> ()");
  m.def(
      "label_upsample(Tensor logits, Tensor y_start, Tensor y_weight, Tensor x_start, Tensor x_weight, "
      "bool background, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tarvis_cuda, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_gather", TORCH_BOX(&ms_deform_attn_gather));
  m.impl("mask_bits", TORCH_BOX(&mask_bits));
  m.impl("mask_upsample", TORCH_BOX(&mask_upsample));
  m.impl("label_upsample", TORCH_BOX(&label_upsample));
}

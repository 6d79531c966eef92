// The binding with its operators registered for CPU tensors, too, over the emulated kernels.

#include "binding.cpp"

// These take the place of PyTorch's own, which know only GPUs.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
}

STABLE_TORCH_LIBRARY_IMPL(tarvis_cuda, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&ms_deform_attn));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&ms_deform_attn_backward));
  m.impl("ms_deform_attn_gather", TORCH_BOX(&ms_deform_attn_gather));
  m.impl("mask_bits", TORCH_BOX(&mask_bits));
  m.impl("mask_upsample", TORCH_BOX(&mask_upsample));
  m.impl("label_upsample", TORCH_BOX(&label_upsample));
}

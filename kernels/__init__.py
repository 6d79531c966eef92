"""GPU operators for segmenting targets in video; each works anywhere through its plain PyTorch reference."""

from kernels.mask_bits import mask_bits
from kernels.masked_attention import masked_attention
from kernels.ms_deform_attn import ms_deform_attn

__all__ = ["mask_bits", "masked_attention", "ms_deform_attn"]

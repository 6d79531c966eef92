"""GPU operators for segmenting targets in video; each works anywhere through its plain PyTorch reference."""

from .dispatch import explain
from .mask_bits import mask_bits
from .mask_cost import mask_cost
from .mask_logits import mask_logits
from .mask_upsample import label_upsample, mask_upsample
from .masked_attention import masked_attention
from .ms_deform_attn import ms_deform_attn
from .ms_deform_attn_classic import ms_deform_attn_classic
from .point_sample import nearest_sample, point_sample

__all__ = [
    "explain",
    "label_upsample",
    "mask_bits",
    "mask_cost",
    "mask_logits",
    "mask_upsample",
    "masked_attention",
    "ms_deform_attn",
    "ms_deform_attn_classic",
    "nearest_sample",
    "point_sample",
]

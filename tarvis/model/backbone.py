"""All backbones, by name: a new one is a file with a `tarvis.model.layers.Backbone`, and a line below."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tarvis.config import ConfigError
from tarvis.model.convnext import ConvNeXt
from tarvis.model.efficientnet import EfficientNetLite
from tarvis.model.layers import Backbone
from tarvis.model.resnet import ResNet
from tarvis.model.swin import Swin

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "resnet50": lambda: ResNet((3, 4, 6, 3)),
    "resnet101": lambda: ResNet((3, 4, 23, 3)),
    "swin_tiny": lambda: Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), window=7),
    "swin_small": lambda: Swin(96, (2, 2, 18, 2), (3, 6, 12, 24), window=7),
    "swin_base": lambda: Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), window=12),
    "swin_large": lambda: Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), window=12),
    # for the tiny configuration: too small and too briefly trained to need stochastic depth
    "convnext_zepto": lambda: ConvNeXt((32, 64, 128, 256), (2, 2, 4, 2), drop_path=0.0),
    "convnext_tiny": lambda: ConvNeXt((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": lambda: ConvNeXt((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": lambda: ConvNeXt((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": lambda: ConvNeXt((192, 384, 768, 1536), (3, 3, 27, 3)),
    "convnext_xlarge": lambda: ConvNeXt((256, 512, 1024, 2048), (3, 3, 27, 3)),
    "efficientnet_lite0": EfficientNetLite,
    "efficientnet_lite1": lambda: EfficientNetLite(depth=1.1),
    "efficientnet_lite2": lambda: EfficientNetLite(width=1.1, depth=1.2),
}


def build_backbone(name: str) -> Backbone:
    """A freshly initialised backbone: normalised frames [N, 3, H, W] -> maps at strides 4, 8, 16, 32.

    Raises:
        ConfigError: no backbone of that name.
    """
    require_backbone(name)
    return BACKBONES[name]()


def require_backbone(name: str) -> None:
    """Raise ConfigError where no backbone has that name."""
    if name not in BACKBONES:
        raise ConfigError(f"model.backbone: expected one of {', '.join(BACKBONES)}, got {name!r}")


def backbone_without_memory(name: str) -> Backbone:
    """A backbone on the meta device: names, shapes and class attributes."""
    with torch.device("meta"):
        return build_backbone(name)

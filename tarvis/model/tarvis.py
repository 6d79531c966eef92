"""TarVis: frames are encoded once, then asked with the queries of any task (paper, figure 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarvis.config import ModelConfig
from tarvis.model.backbone import build_backbone
from tarvis.model.decoder import MaskedDecoder
from tarvis.model.neck import TemporalNeck
from tarvis.model.object_encoder import ObjectEncoder
from tarvis.model.queries import QueryEmbeddings
from tarvis.structures import STRIDE, Features, Prediction, Queries

PAD_VALUE = 128.0
"""Grey of the padding, before normalisation."""


class TarVis(nn.Module):
    """The network.

    `encode` and `decode` are all that a task needs, with `queries` and `object_encoder` to make its queries.
    Neither synchronises with the device nor branches on values: both trace under torch.export and compile
    without graph breaks.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, heads = config.hidden_dim, config.num_heads
        self.backbone = build_backbone(config.backbone)
        self.register_buffer("pixel_mean", torch.tensor(self.backbone.pixel_mean))
        self.register_buffer("pixel_std", torch.tensor(self.backbone.pixel_std))
        self.neck = TemporalNeck(
            self.backbone.channels, dim, heads, config.num_points, config.neck_layers, config.neck_ffn_dim
        )
        self.queries = QueryEmbeddings(dim, config.num_instance_queries, config.class_sets)
        self.decoder = MaskedDecoder(
            dim, heads, config.decoder_layers, config.decoder_ffn_dim, soft=config.attention == "soft"
        )
        self.object_encoder = ObjectEncoder(
            dim,
            heads,
            config.object_encoder_layers,
            config.decoder_ffn_dim,
            config.num_queries_per_object,
            config.background_grid,
        )

    @property
    def device(self) -> torch.device:
        """The device that frames must be on."""
        return self.pixel_mean.device

    def encode(self, frames: Tensor) -> Features:
        """Frames [B, T, 3, H, W], RGB in 0..255 (uint8 or float), any size -> features of the padded clip."""
        return self.fuse(self.extract(frames))

    def extract(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Backbone maps [B, T, C_i, H/s, W/s] at strides 4, 8, 16, 32, each frame for itself.

        Kept apart from `fuse` so that the frames two clips share pass the backbone once.
        """
        B, T = frames.shape[:2]
        maps = self.backbone(self.prepare(frames.flatten(0, 1)))
        return tuple(x.unflatten(0, (B, T)) for x in maps)

    def fuse(self, pyramid: tuple[Tensor, ...]) -> Features:
        """Backbone maps of a clip -> its features, mixed over time."""
        features: Features = self.neck(pyramid)
        return features

    def decode(self, features: Features, queries: Queries, *, all_layers: bool = False) -> Prediction:
        """Ask the clip. With `all_layers` (training) the prediction also holds those of earlier layers."""
        prediction: Prediction = self.decoder(features, queries, all_layers=all_layers)
        return prediction

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames [N, 3, H, W] -> normalised, padded right and bottom to multiples of 64."""
        H, W = frames.shape[-2:]
        # not -H % STRIDE: a negative operand does not trace with symbolic sizes
        bottom, right = (H + STRIDE - 1) // STRIDE * STRIDE - H, (W + STRIDE - 1) // STRIDE * STRIDE - W
        frames = F.pad(frames.to(self.pixel_mean.dtype), (0, right, 0, bottom), value=PAD_VALUE)
        return (frames - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]

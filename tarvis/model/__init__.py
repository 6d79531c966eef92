"""The network of the paper, one file a box of its figure."""

from tarvis.config import ModelConfig
from tarvis.model.tarvis import TarVis


def build_model(config: ModelConfig) -> TarVis:
    """A freshly initialised network in training mode, parameters in float32."""
    return TarVis(config)


__all__ = ["TarVis", "build_model"]

"""The smallest network that has every part, for tests of files of weights."""

from tarvis.config import ModelConfig

SMALLEST = ModelConfig(
    backbone="convnext_zepto",
    hidden_dim=64,
    neck_layers=1,
    neck_ffn_dim=64,
    decoder_layers=3,
    decoder_ffn_dim=64,
    object_encoder_layers=1,
    num_instance_queries=5,
    class_sets={"ovis": 25},
)

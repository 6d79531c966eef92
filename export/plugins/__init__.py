"""Deformable attention inside TensorRT: a plugin that launches the Triton kernel, and its PTX."""

DOMAIN, NAME = "tarvis", "MSDeformAttn"
"""Of the node that `export.functions` defines."""

FLOATS = ("float32", "float16", "bfloat16")
"""Types of the plugin's tensors, in the words of torch and TensorRT."""

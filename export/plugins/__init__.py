"""Deformable attention inside TensorRT: a plugin that launches the Triton kernel, and its PTX."""

DOMAIN, NAME = "tarvis", "MSDeformAttn"
"""Of the node that `export.functions` defines."""

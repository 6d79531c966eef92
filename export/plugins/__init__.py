"""Deformable attention inside TensorRT: a plugin that launches the Triton kernel, and its PTX."""

DOMAIN, NAME = "tarvis", "MSDeformAttn"
"""As in `export.functions`, which needs packages that are not needed to run an engine."""

"""Triton kernels and their launchers, imported when first launched."""

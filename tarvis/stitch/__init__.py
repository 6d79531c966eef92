"""Clips become a video: tracks, given objects, panoptic maps."""

"""A video in, its results out."""

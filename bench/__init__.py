"""Benchmarks: `pytest bench/ --benchmark-only`, or one module a command."""

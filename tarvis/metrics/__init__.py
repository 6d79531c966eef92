"""The benchmarks' numbers: NumPy in, numbers out. No files, and nothing of the rest of the package."""

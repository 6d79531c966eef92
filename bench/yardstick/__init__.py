"""The published network and losses, written down plainly: what the benchmarks compare against."""

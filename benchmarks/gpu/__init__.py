"""Checks and times the GPU kernels; see benchmarks/README.md."""

"""Checks and times the kernels for GPUs; see README.md."""

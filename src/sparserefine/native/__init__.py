"""Kernels in C++ for the CPU: sources, their build, their loading. ``sparse/cpu`` calls them."""

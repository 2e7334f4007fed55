"""Kernels in C++ for the CPU: sources, their build, their loading. ``engines/cpu`` calls them."""

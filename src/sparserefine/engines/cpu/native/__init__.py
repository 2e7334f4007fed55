"""C++ kernels for the CPU: sources, build and loading. ``engines/cpu`` calls them."""

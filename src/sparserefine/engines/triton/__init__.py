"""Engine ``triton``: GPU kernels, each compiled on its first call."""

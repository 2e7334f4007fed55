"""Engine ``triton``: kernels for GPUs, compiled when they are first called."""

"""Engine ``cpu``: the sparse network on compiled kernels (``native/``), for inference and training on the CPU."""

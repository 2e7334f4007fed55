"""Engine ``cpu``: compiled kernels (``native/``) for inference and training on the CPU."""

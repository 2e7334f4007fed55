"""Engine ``torch``: defines the results of all engines. Runs on any device."""

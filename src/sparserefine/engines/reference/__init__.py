"""Engine ``torch``: it defines each result, on any device."""

"""The machine: devices, timing, memory."""

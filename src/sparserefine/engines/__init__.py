"""Engines execute the sparse network. The reference engine defines the results; the others are only faster."""

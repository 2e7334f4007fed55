"""Reads and writes images, labels and settings. A file is written completely or not at all."""

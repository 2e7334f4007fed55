"""Labelled images on disk, and training crops of them."""

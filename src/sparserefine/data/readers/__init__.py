"""Datasets on disk, one file each."""

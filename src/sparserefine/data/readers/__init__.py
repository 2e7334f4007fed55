"""Readers of datasets on disk, one file per dataset."""

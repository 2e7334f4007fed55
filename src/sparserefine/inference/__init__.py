"""Refiners at work on files."""

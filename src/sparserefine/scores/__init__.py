"""Scores of label maps: pure functions."""

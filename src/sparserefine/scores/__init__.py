"""Scores of label maps: pure functions, and the counts that they are computed from."""

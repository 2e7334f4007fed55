"""Scores and costs of refinement: evaluation, benchmark, demo."""

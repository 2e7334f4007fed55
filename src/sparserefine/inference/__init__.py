"""Prediction for image files."""

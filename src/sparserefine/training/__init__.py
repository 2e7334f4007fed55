"""Losses, scores and the Lightning module."""
